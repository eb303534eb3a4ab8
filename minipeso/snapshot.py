"""What training may change in a model, to go back to it: every method starts from one model of D_1."""
from typing import NamedTuple

from torch import Tensor

from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapters, rewrap


class Snapshot(NamedTuple):
    """Adapters with their anchors and histories, the rows of new tokens, perhaps the token tables."""
    tensors: dict[str, Tensor]
    tied: bool
    adapter: type[LoRALinear]


def snapshot(model: Llama, tables: bool = False) -> Snapshot:
    """A copy of adapters with anchors and histories, and of the new tokens' rows; `tables`: of all tokens' rows."""
    layers = dict(adapters(model))
    state = {f"{name}.{k}": t for name, layer in layers.items() for k, t in layer.state_dict().items() if k != "weight"}
    ends = ("embed_tokens.rows", "lm_head.rows") + tables * ("embed_tokens.weight", "lm_head.weight")
    state |= {name: t for name, t in model.state_dict().items() if name.endswith(ends)}
    tied, adapter = model.lm_head is model.model.embed_tokens, type(next(iter(layers.values())))
    return Snapshot({name: t.clone() for name, t in state.items()}, tied, adapter)


def restore(model: Llama, saved: Snapshot) -> None:
    """Back to a snapshot, bit for bit: class of adapter, tying and every tensor."""
    rewrap(model, saved.adapter)
    if saved.tied:
        model.lm_head = model.model.embed_tokens
    else:
        model.untie()
    model.load_state_dict(model.state_dict() | saved.tensors)
