"""The Jacobian of the held features with respect to a perturbation: products, solves, restoration.

feature_map: Φ itself. linearized: Φ at one iterate, with products J·u and Jᵀ·y. entries: which of Φ
are constraints of each row. ways: how each row is kept where Φ = 0, one of four. From products
(level): preconditioners are what is near (JJᵀ)⁻¹ and cheap, null_space solves with JJᵀ,
restoration goes back to Φ = 0. With J itself near an iterate (frame, framed): offsets are
coordinates in which clamps make no jumps, settled those in which perturbed slots are no constraints
either, chords the corrections in them, way_back the way of many lanes by these, and learned what
corrections say of J.
"""
