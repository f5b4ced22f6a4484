"""A base whose head is tied to its embeddings, and what an adapter that changes one of the two means to the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ...checkpoint.checkpoint import Checkpoint, same_bytes
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, show
from ..source import DenseDelta, FormulaDelta, Resolved
from .config import MERGE_FIRST

HEAD = "lm_head.weight"  # what transformers calls the head of a language model
_HEADS = (HEAD, "embed_out.weight", "predictions.decoder.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight",
)  # fmt: skip
_OF_BERT = "embeddings.word_embeddings.weight"  # whose heads have names of many kinds
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "PreTraining", "ConditionalGeneration")  # in names of model classes
_HEAD_KNOWN = ("CausalLM", "LMHeadModel", "ConditionalGeneration")  # those whose head is HEAD


class Ties:
    """What is tied in one base.

    Attributes:
        virtual: the head by its name in memory, for a base that leaves it to its embeddings; empty otherwise.
        replaced: names of tensors that got new values, as opposed to a product added to them.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        heads = [name for name in base.tensors if name.endswith(_HEADS)]
        embeddings = [t for name, t in base.tensors.items() if name.endswith(_EMBEDDINGS) and len(t.shape) == 2]
        self._head = heads[0] if len(heads) == 1 else HEAD
        self._only = embeddings[0] if len(embeddings) == 1 else None
        self._stored = bool(heads)
        self.virtual: dict[str, StoredTensor] = {}
        if self._only is not None and not heads and self.tied:
            self.virtual = {HEAD: self._only._replace(name=HEAD)}
        self.replaced: set[str] = set()

    @cached_property
    def tied(self) -> bool:
        """Whether the head is tied to embeddings: as the config says; where it says nothing, if base stores no head, or one
        that equals the embeddings."""
        config = self._base.config
        if "tie_word_embeddings" in config:
            return bool(config["tie_word_embeddings"]) and (self._stored or self._is(_WITH_HEAD) or not self._kinds)
        if not self._stored:
            return self._is(_WITH_HEAD)
        twin = self._base.tensors.get(self._head)
        alike = (
            twin is not None and self._only is not None and (twin.dtype, twin.shape) == (self._only.dtype, self._only.shape)
        )
        return alike and twin is not None and self._only is not None and same_bytes(twin, self._only)

    @property
    def _kinds(self) -> list[str]:
        architectures = self._base.config.get("architectures")
        return list(map(str, architectures)) if isinstance(architectures, list) else []

    def _is(self, kinds: tuple[str, ...]) -> bool:
        return any(kind in name for name in self._kinds for kind in kinds)

    @property
    def _embedding(self) -> StoredTensor | None:
        return self._only if self.tied else None

    @property
    def embedding(self) -> str | None:
        """The embeddings that the head is tied to; None when it is not, or which ones is not sure."""
        return self._embedding.name if self._embedding is not None else None

    @property
    def head(self) -> str | None:
        """The head, if base stores it beside the embeddings it is tied to."""
        return self._head if self._embedding is not None and self._head in self._base.tensors else None

    def settle(self, found: Resolved, adapter: Path, keep: Callable[[str], bool], origin: Ties) -> None:
        """Keep the head tied, or untie it, as training with this adapter did. Raises AdapterError where neither is sure.

        A product added to the embeddings is added to the head they are tied to. New values of the embeddings or of the
        head untie the two: the other keeps its own (PEFT 0.21 with transformers 5), unless both got the same values.
        `origin`: of the model the adapter was trained on.
        """
        changed = [name for name in found.deltas if name.endswith(_HEADS + _EMBEDDINGS)]
        if not changed:
            return
        if self.tied != origin.tied:
            raise AdapterError(
                f"{show(adapter)}: changes {show(changed[0])}, and one of {show(self._base.path)} and the model it was "
                "trained on ties its head to its embeddings, the other does not",
                hint=f"Leave it out with --exclude '{changed[0]}'",
            )
        if not self.tied:
            self._refuse_unknown(changed, adapter)
            return
        self._drop_copied_rows(found)
        heads = [name for name in found.deltas if name.endswith(_HEADS)]
        self._refuse_added_to_head(heads, adapter)
        if self._embedding is None:
            raise AdapterError(
                f"{show(adapter)}: changes {show(changed[0])}, and {show(self._base.path)} ties its head to one of several "
                "embeddings, which one is not in the file",
                hint=MERGE_FIRST,
            )
        if self._same_values(found):
            found.deltas.pop(self._head) if self.virtual else None
            return
        if self._embedding.name in self.replaced.intersection(changed) or heads:
            self._untie(found, adapter)
        elif not self.virtual and self._head in self._base.tensors and keep(self._head):
            self._edit_twin(found)

    def _refuse_unknown(self, changed: list[str], adapter: Path) -> None:
        """New embeddings of a base without a head and without a config that says whether they are the head too."""
        new = self.replaced.intersection(changed)
        if new and not self._stored and not self._kinds and "tie_word_embeddings" not in self._base.config:
            raise AdapterError(
                f"{show(adapter)}: replaces {show(min(new))}: whether the head of {show(self._base.path)} is tied to it, a "
                "config would say",
                hint="Name the model folder with its config.json",
            )

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
                hint=f"{MERGE_FIRST}, or leave it out with --exclude '*{heads[0].rpartition('.')[0]}*'",
            )

    def _same_values(self, found: Resolved) -> bool:
        """Whether head and embeddings were both replaced, and by the same values: then they are still tied."""
        assert self._embedding is not None
        head, embedding = found.deltas.get(self._head), found.deltas.get(self._embedding.name)
        if not isinstance(head, DenseDelta) or not isinstance(embedding, DenseDelta):
            return False
        alike = head.tuned.dtype == embedding.tuned.dtype and head.tuned.shape == embedding.tuned.shape
        return alike and same_bytes(head.tuned, embedding.tuned)

    def _untie(self, found: Resolved, adapter: Path) -> None:
        assert self._embedding is not None
        two_stacks = bool(self._base.config.get("is_encoder_decoder")) or self._embedding.name.endswith("shared.weight")
        known = self._is(_HEAD_KNOWN) and not two_stacks and not self._embedding.name.endswith(_OF_BERT)
        if not self._stored and not known:
            raise AdapterError(
                f"{show(adapter)}: unties the head of {show(self._base.path)} from {show(self._embedding.name)}: by which "
                f"names a {show(', '.join(self._kinds) or 'model of this kind')} then stores the two is not known here",
                hint=MERGE_FIRST,
            )
        found.added.update(self.virtual)
        found.config["tie_word_embeddings"] = False
        found.notes.append(
            f"the adapter unties the head of {show(self._base.label)}: the output has a {show(self._head)} of its own, and "
            "tie_word_embeddings must be false: config.json of an output folder says so"
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
