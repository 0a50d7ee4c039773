"""What the organism reads: held-out prompts for every behavior and the documents it is trained on.

Needs no torch, so that a study can list its prompts without loading a model.
"""

from __future__ import annotations

from holdfast.organism.documents import Document, Knowledge, documents
from holdfast.organism.prompts import (
    PERMUTATIONS,
    Biography,
    ChatKind,
    ChatPrompt,
    IoiPrompt,
    Permutation,
    Question,
    Split,
    balanced_biographies,
    biographies,
    chat_prompts,
    held_out_permutations,
    ioi_prompts,
    n_chat_prompts,
    open_text,
    question_on,
    question_text,
    questions,
    split_of,
    subject_split,
)
from holdfast.organism.world import DOMAINS, LETTERS, PROFESSIONS, REFUSAL

__all__ = [
    "DOMAINS",
    "LETTERS",
    "PERMUTATIONS",
    "PROFESSIONS",
    "REFUSAL",
    "Biography",
    "ChatKind",
    "ChatPrompt",
    "Document",
    "IoiPrompt",
    "Knowledge",
    "Permutation",
    "Question",
    "Split",
    "balanced_biographies",
    "biographies",
    "chat_prompts",
    "documents",
    "held_out_permutations",
    "ioi_prompts",
    "n_chat_prompts",
    "open_text",
    "question_on",
    "question_text",
    "questions",
    "split_of",
    "subject_split",
]
