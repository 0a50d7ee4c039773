"""The Jacobian of the held features with respect to a perturbation: products, solves, restoration.

feature_map: Φ itself. linearized: Φ at one iterate, with products J·u and Jᵀ·y. preconditioners:
what is near (JJᵀ)⁻¹ and cheap. null_space: solves with JJᵀ, and directions that move no feature.
restoration: back to Φ = 0. For few constraints on few unknowns: frame is J itself near an iterate,
offsets are coordinates in which clamps make no jumps, chords the way back in them, framed the set.
"""
