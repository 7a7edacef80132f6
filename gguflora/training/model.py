"""transformers' model of a GGUF file, every matrix of it packed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from gguflora.errors import ArchitectureError, MissingExtraError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING
from gguflora.training.configs import Header, kind_of
from gguflora.training.layers import DTYPES, PackedEmbedding, PackedExperts, PackedLinear
from gguflora.training.packed import PackedBase

_LOG = logging.getLogger(__name__)
_OLDEST: Final = (5, 0)
"""The first version of transformers whose modules have the names that gguflora knows."""


@dataclass(frozen=True, slots=True, eq=False)
class Below:
    """Hidden states in place of the lowest blocks.

    Attributes:
        first: the block that takes them as its input.
        states: (n_samples, n_positions, width).
    """

    first: int
    states: torch.Tensor


class PackedModel:
    """A causal language model of transformers on the packed weights of a file.

    Attributes:
        packed: the file.
        module: transformers' model.
        n_ctx: positions that it was trained with.
        can_pack: whether samples can share a row without attending to each other.

    Raises:
        ArchitectureError: if the architecture cannot be trained, or a weight is missing.
        MissingExtraError: if transformers is missing or too old.
    """

    def __init__(self, packed: PackedBase, precision: str = "f32") -> None:
        transformers = _transformers()
        kind, header = kind_of(packed), Header(packed)
        self.packed, self.n_ctx, self._dtype = packed, header.context, DTYPES[precision]
        self._blocks_return_tuples, self.can_pack = kind.tuples, kind.packs
        config = getattr(transformers, kind.config)(**kind.fields(header))
        with _without_weights():
            self.module: Any = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=kind.attention, dtype=torch.float32
            )
        self.config = self.module.config
        self.config.use_cache = False
        self._head = self.module.get_output_embeddings()
        embedding = self.module.get_input_embeddings()
        modules = dict(self.module.named_modules())
        self._embedding = next(name for name, module in modules.items() if module is embedding)
        for name, module in modules.items():
            self._fill(module, name)
        self._apply_frequency_factors()
        self.module.requires_grad_(False).eval()

    @property
    def backbone(self) -> Any:  # noqa: ANN401  (transformers has no types here)
        """The model without its output layer."""
        return self.module.base_model

    @property
    def head(self) -> nn.Module:
        """The output layer."""
        head: nn.Module = self.module.get_output_embeddings()
        return head

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in order."""
        found: nn.ModuleList = next(
            module for module in self.backbone.children() if isinstance(module, nn.ModuleList) and len(module)
        )
        return found

    def linears(self) -> dict[str, PackedLinear]:
        """The linear layers by name, but for the output layer."""
        return {
            name: module
            for name, module in self.module.named_modules()
            if isinstance(module, PackedLinear) and module is not self.head
        }

    def experts(self) -> dict[str, PackedExperts]:
        """The experts of each layer that has some, by name."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, PackedExperts)}

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(self.config.hidden_size)

    def block_of(self, name: str) -> int:
        """The block that a module lies in; 0 also for a module outside of all."""
        prefix = next(own for own, module in self.module.named_modules() if module is self.layers)
        number = name.removeprefix(f"{prefix}.").partition(".")[0]
        return int(number) if number.isdecimal() else 0

    def hidden(
        self,
        tokens: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        below: Below | None = None,
    ) -> torch.Tensor:
        """What the output layer is given: (n_samples, n_positions, width).

        Args:
            tokens: (n_samples, n_positions).
            embeddings: (n_samples, n_positions, width), in place of tokens.
            positions: (n_samples, n_positions) numbers of the tokens in their samples, where several share a row.
            below: states in place of the lowest blocks, which are not computed then.
        """
        given = {"input_ids": tokens} if embeddings is None else {"inputs_embeds": embeddings}
        if positions is not None:
            given["position_ids"] = positions
        stand_ins: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        if below is not None:
            stand_ins = dict.fromkeys(range(below.first - 1), _unchanged)
            stand_ins[below.first - 1] = lambda _: below.states
        with self._standing_in(stand_ins):
            state: torch.Tensor = self.backbone(**given, use_cache=False).last_hidden_state
        return state

    @torch.no_grad()
    def states_below(self, first: int, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The input of a block: (n_samples, n_positions, width)."""
        seen: list[torch.Tensor] = []

        def see(state: torch.Tensor) -> torch.Tensor:
            seen.append(state)
            return state

        with self._standing_in({first: see, **dict.fromkeys(range(first + 1, len(self.layers)), _unchanged)}):
            self.backbone(input_ids=tokens, position_ids=positions, use_cache=False)
        return seen[0]

    @contextmanager
    def _standing_in(self, stand_ins: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Let blocks compute something else while the block runs."""

        def forward(compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
            if self._blocks_return_tuples:
                return lambda state, *_, **__: (compute(state),)
            return lambda state, *_, **__: compute(state)

        for number, compute in stand_ins.items():
            vars(self.layers[number])["forward"] = forward(compute)
        try:
            yield
        finally:
            for number in stand_ins:
                del vars(self.layers[number])["forward"]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states."""
        logits: torch.Tensor = self.head(hidden)
        scale, divisor = getattr(self.config, "logit_scale", None), getattr(self.config, "logits_scaling", None)
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def recompute(self, on: bool) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest of it again."""
        word = "activation" if hasattr(self.module, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(self.module, f"{word}_checkpointing_enable")({"use_reentrant": False})
            self.module.train()  # transformers recomputes in this mode only; no module drops anything out
        else:
            getattr(self.module, f"{word}_checkpointing_disable")()
            self.module.eval()

    def _fill(self, module: nn.Module, name: str) -> None:
        """Give one module its weights."""
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            self.module.set_submodule(name, self._linear(module, name))
        elif isinstance(module, nn.Embedding):
            factor = getattr(module, "scalar_embed_scale", 1.0)
            self.module.set_submodule(name, PackedEmbedding(self.packed.matrix(f"{name}.weight"), float(factor)))
        elif {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys():
            self.module.set_submodule(name, self._experts(module, name))
        else:
            for own, parameter in list(module.named_parameters(recurse=False)):
                values = self.packed.dense(f"{name}.{own}" if name else own, tuple(parameter.shape))
                setattr(module, own, nn.Parameter(values, requires_grad=False))

    def _linear(self, module: Any, name: str) -> PackedLinear:  # noqa: ANN401
        is_tied = module is self._head and not self.packed.has(OUTPUT)
        matrix = self.packed.matrix(f"{self._embedding if is_tied else name}.weight")
        bias = None if module.bias is None else self.packed.dense(f"{name}.bias", tuple(module.bias.shape))
        return PackedLinear(matrix, bias, self._dtype)

    def _experts(self, module: Any, name: str) -> PackedExperts:  # noqa: ANN401
        if {own for own, _ in module.named_parameters()} != {"gate_up_proj", "down_proj"}:
            raise ArchitectureError(f"{self.packed.path}: experts with biases cannot be trained on yet ({name})")
        count = module.gate_up_proj.shape[0]
        gate_up = [self.packed.matrix(f"{name}.gate_up_proj.{expert}") for expert in range(count)]
        down = [self.packed.matrix(f"{name}.down_proj.{expert}") for expert in range(count)]
        return PackedExperts(gate_up, down, module.act_fn, self._dtype)

    def _apply_frequency_factors(self) -> None:
        """Divide the rotary frequencies as llama.cpp does (Llama 3.1; Phi 3 within its original context)."""
        name = next((n for n in ("rope_freqs.weight", "rope_factors_short.weight") if self.packed.has(n)), None)
        if name is None:
            return
        factors = torch.from_numpy(self.packed.vector(name))
        scale = float(Header(self.packed).get("rope.scaling.attn_factor", 1.0)) if "short" in name else 1.0
        for module in self.module.modules():
            if "inv_freq" in dict(module.named_buffers(recurse=False)):
                for buffer in ("inv_freq", "original_inv_freq"):
                    setattr(module, buffer, getattr(module, buffer) / factors)
                module.attention_scaling = scale


def _unchanged(state: torch.Tensor) -> torch.Tensor:
    return state


def embedding_width(packed: PackedBase) -> int:
    """Numbers of an embedding."""
    return packed.shape(TOKEN_EMBEDDING)[-1]


def _transformers() -> Any:  # noqa: ANN401
    try:
        import transformers  # noqa: PLC0415  (heavy)
    except ImportError as error:
        raise MissingExtraError("training", "transformers", "train") from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < _OLDEST:
        raise MissingExtraError(
            f"training (found transformers {transformers.__version__})", "transformers 5 or newer", "train"
        )
    return transformers


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let new modules have parameters without memory, but buffers with their values (rotary frequencies)."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register
