"""lm-evaluation-harness's own preparation of HellaSwag's questions, for the task beside this file."""

from lm_eval.tasks.hellaswag.utils import process_docs

__all__ = ["process_docs"]
