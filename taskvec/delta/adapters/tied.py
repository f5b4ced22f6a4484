"""A base whose head is tied to its embeddings, and what an adapter that changes one of the two means to the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...checkpoint.checkpoint import Checkpoint, same_bytes
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, show
from ..source import DenseDelta, FormulaDelta, Resolved

HEAD = "lm_head.weight"  # what transformers calls the head of a language model
_HEADS = (HEAD, "embed_out.weight", "predictions.decoder.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight",
)  # fmt: skip
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "PreTraining", "ConditionalGeneration")  # in names of model classes
_MERGE_FIRST = "Merge it with PEFT (merge_and_unload, save_pretrained) and subtract the merged model"


class Ties:
    """What is tied in one base.

    Attributes:
        virtual: the head by its name in memory, for a base that leaves it to its embeddings; empty otherwise.
        replaced: names of tensors that got new values, as opposed to a product added to them.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        heads = [name for name in base.tensors if name.endswith(_HEADS)]
        architectures = base.config.get("architectures")
        kinds = architectures if isinstance(architectures, list) else []
        has_head = any(kind in str(name) for name in kinds for kind in _WITH_HEAD)
        flag = base.config.get("tie_word_embeddings", not heads)
        self._tied = bool(flag) and (has_head or bool(heads))
        embeddings = [t for name, t in base.tensors.items() if name.endswith(_EMBEDDINGS) and len(t.shape) == 2]
        self._embedding = embeddings[0] if self._tied and len(embeddings) == 1 else None
        self._head = heads[0] if len(heads) == 1 else HEAD
        self.virtual: dict[str, StoredTensor] = {}
        if self._embedding is not None and not heads:
            self.virtual = {HEAD: self._embedding._replace(name=HEAD)}
        self.replaced: set[str] = set()

    @property
    def embedding(self) -> str | None:
        """The embeddings that the head is tied to; None when it is not, or which ones is not sure."""
        return self._embedding.name if self._embedding is not None else None

    @property
    def head(self) -> str | None:
        """The head, if base stores it beside the embeddings it is tied to."""
        return self._head if self._embedding is not None and self._head in self._base.tensors else None

    def settle(self, found: Resolved, adapter: Path, keep: Callable[[str], bool]) -> None:
        """Keep the head tied, or untie it, as training with this adapter did. Raises AdapterError where neither is sure.

        A product added to the embeddings is added to the head they are tied to. New values of the embeddings or of the
        head untie the two: the other keeps its own (PEFT 0.21 with transformers 5), unless both got the same values.
        """
        if not self._tied:
            return
        self._drop_copied_rows(found)
        heads = [name for name in found.deltas if name.endswith(_HEADS)]
        embeddings = [name for name in found.deltas if name.endswith(_EMBEDDINGS)]
        if not heads and not embeddings:
            return
        self._refuse_added_to_head(heads, adapter)
        if self._embedding is None:
            raise AdapterError(
                f"{show(adapter)}: changes {show((heads + embeddings)[0])}, and {show(self._base.path)} ties its head to one "
                "of several embeddings, which one is not in the file",
                hint=_MERGE_FIRST,
            )
        if self._same_values(found):
            found.deltas.pop(self._head) if self.virtual else None
            return
        if self._embedding.name in self.replaced.intersection(embeddings) or heads:
            self._untie(found)
        elif not self.virtual and self._head in self._base.tensors and keep(self._head):
            self._edit_twin(found)

    def _drop_copied_rows(self, found: Resolved) -> None:
        """Trainable tokens of a tied model are one tensor, which PEFT 0.21 stores for the head too."""
        head = found.deltas.get(self._head)
        embedding = found.deltas.get(self._embedding.name) if self._embedding else None
        if not isinstance(head, FormulaDelta) or not isinstance(embedding, FormulaDelta):
            return
        if not head.formula.replaces or head.formula != embedding.formula:
            return
        pairs = list(zip(head.tensors, embedding.tensors))
        if all(one.dtype == other.dtype and one.shape == other.shape and same_bytes(one, other) for one, other in pairs):
            del found.deltas[self._head]

    def _refuse_added_to_head(self, heads: list[str], adapter: Path) -> None:
        if set(heads) - self.replaced:
            raise AdapterError(
                f"{show(adapter)}: changes {show(heads[0])}, which {show(self._base.path)} ties to its embeddings: "
                "whether the embeddings change too is not in the file",
                hint=f"{_MERGE_FIRST}, or leave it out with --exclude '*{heads[0].rpartition('.')[0]}*'",
            )

    def _same_values(self, found: Resolved) -> bool:
        """Whether head and embeddings were both replaced, and by the same values: then they are still tied."""
        assert self._embedding is not None
        head, embedding = found.deltas.get(self._head), found.deltas.get(self._embedding.name)
        if not isinstance(head, DenseDelta) or not isinstance(embedding, DenseDelta):
            return False
        alike = head.tuned.dtype == embedding.tuned.dtype and head.tuned.shape == embedding.tuned.shape
        return alike and same_bytes(head.tuned, embedding.tuned)

    def _untie(self, found: Resolved) -> None:
        found.added.update(self.virtual)
        found.config["tie_word_embeddings"] = False
        found.notes.append(
            f"the adapter unties the head of {show(self._base.label)}: the output has a {show(self._head)} of its own, and "
            "its config.json says tie_word_embeddings: false"
        )

    def _edit_twin(self, found: Resolved) -> None:
        """base stores the tied head a second time: it changes as the embeddings do."""
        assert self._embedding is not None
        head = self._base.tensors[self._head]
        alike = (head.dtype, head.shape) == (self._embedding.dtype, self._embedding.shape)
        if not alike or not same_bytes(head, self._embedding):
            raise AdapterError(
                f"{show(head.path)}: tensor {show(head.name)}: config.json ties it to {show(self._embedding.name)}, but they "
                "differ",
                hint="Set tie_word_embeddings to what the model was saved with",
            )
        found.deltas[head.name] = found.deltas[self._embedding.name]
