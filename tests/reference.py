"""What a cut has to compute, written down again without the package.

A Mixtral forward in plain torch and float64, straight from the safetensors files, and
Wanda from its formula. Here nothing is removed: experts that a plan drops are barred
from selection, so that cutting them out must give the same.

Axes: S sequences, T tokens of a sequence, N = S*T tokens, n some of them, D hidden,
E experts, F expert width, H heads, R rows and C columns of any matrix.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LayerCut:
    """What happens to one layer, as in a plan; the default is nothing."""

    keep: Ids | None = None
    """None: all."""
    clusters: tuple[Ids, ...] | None = None
    unserved: Ids = ()
    """Removed experts whose router rows stay, and lead nowhere."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """Of the cluster members in their mean; None: all alike."""
    reconstruct: bool = False
    action: str = "keep"
    sparsity: float = 0.0

    def kept(self, experts: int) -> Ids:
        """The experts that are left, in their new order."""
        if self.action != "keep":
            return ()
        return tuple(range(experts)) if self.keep is None else self.keep

    def means(self) -> list[tuple[Ids, tuple[float, ...]]]:
        """What each survivor and its router row are averaged from: ids and weights."""
        clusters = self.clusters if self.reconstruct and self.clusters else ()
        even = tuple((1 / len(ids),) * len(ids) for ids in clusters)
        return list(zip(clusters, self.weights or even, strict=False))


DROP_MOE = LayerCut(action="drop-moe")
DROP_MOE_KEEP_NORM = LayerCut(action="drop-moe-keep-norm")
DROP_BLOCK = LayerCut(action="drop-block")
Cuts = Mapping[int, LayerCut]


def write_plan(
    path: Path,
    checkpoint: Any,
    cuts: Cuts,
    *,
    routing: str = "drop",
    slim: str = "none",
    quantize: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Write a plan file by hand; ``checkpoint`` only gives fingerprint and counts."""
    layers = []
    for layer in checkpoint.layers:
        cut = cuts.get(layer.index, LayerCut())
        clusters = cut.clusters
        if clusters is None and routing == "redirect" and cut.action == "keep":
            clusters = tuple((expert,) for expert in cut.kept(layer.num_experts))
        layers.append(
            {
                "layer": layer.index,
                "action": cut.action,
                "experts": layer.num_experts,
                "keep": cut.kept(layer.num_experts),
                "clusters": clusters,
                "unserved": cut.unserved,
                "merge_weights": cut.weights,
                "reconstruct": cut.reconstruct,
                "sparsity": cut.sparsity,
            }
        )
    plan = {
        "format_version": 1,
        "tool_version": "1.2.3",
        "model": {
            "model_type": checkpoint.config["model_type"],
            "fingerprint": checkpoint.fingerprint,
            "source": checkpoint.origin.name,
        },
        "recipe": dict(recipe or {}),
        "routing": routing,
        "slim": slim,
        "quantize": dict(quantize or {}),
        "layers": layers,
    }
    path.write_text(json.dumps(plan), encoding="utf-8")
    return path


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, in its stored dtype, by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes: equal NaNs are equal, 0.0 and -0.0 are not."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def read_json(path: Path) -> Any:
    """A parsed JSON file."""
    return json.loads(path.read_text("utf-8"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but run.json, which tells time and memory."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


class Expert(NamedTuple):
    """One expert's matrices."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """The expert's output for some tokens."""
        return self.inner(x_ND) @ self.down_DF.T

    def inner(self, x_ND: Tensor) -> Tensor:
        """What its down projection reads."""
        return functional.silu(x_ND @ self.gate_FD.T) * (x_ND @ self.up_FD.T)


def router_of(tensors: Mapping[str, Tensor], layer: int) -> Tensor:
    """A layer's router rows [E, D]."""
    names = (f"{prefix}gate.weight" for prefix in _moe_prefixes(layer))
    return next(tensors[name] for name in names if name in tensors)


def experts_of(tensors: Mapping[str, Tensor], layer: int) -> list[Expert]:
    """A layer's experts, whatever way the checkpoint spells them."""
    experts: list[Expert] = []
    for prefix in _moe_prefixes(layer):
        packed = tensors.get(f"{prefix}experts.gate_up_proj")
        if packed is not None:
            down = tensors[f"{prefix}experts.down_proj"]
            for gate_up, down_DF in zip(packed, down, strict=True):
                experts.append(Expert(*gate_up.chunk(2), down_DF))
        for spelling in (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")):
            at = f"{prefix}experts.{{}}.{{}}.weight"
            while at.format(len(experts), spelling[0]) in tensors:
                number = len(experts)
                names = [at.format(number, matrix) for matrix in spelling]
                experts.append(Expert(*(tensors[name] for name in names)))
    return experts


def _moe_prefixes(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{moe}." for moe in ("block_sparse_moe", "mlp")]


class Zeroed(NamedTuple):
    """What Wanda zeroes, by the layer's input index."""

    masks: dict[int, list[Expert]]
    """Per surviving expert in new order, True where a weight goes."""
    unseen: dict[int, list[int]]
    """Input ids of survivors that no token reached."""


class Reference:
    """A checkpoint as a function, with a plan applied by masking."""

    def __init__(
        self, folder: Path, cuts: Cuts | None = None, *, routing: str = "drop"
    ) -> None:
        """Read everything; the models of these tests are tiny."""
        self.config = read_json(folder / "config.json")
        self.stored = read_tensors(folder)
        self.tensors = {name: value.double() for name, value in self.stored.items()}
        self.cuts = cuts or {}
        self.routing = routing
        self.layers = range(self.config["num_hidden_layers"])
        self.loads: dict[int, list[int]] = {}
        """Layer -> routed slots of each survivor, of all tokens so far."""

    def logits(self, ids_ST: Tensor) -> Tensor:
        """Next-token logits [S, T, V]."""
        hidden_STD = self._norm(self.hidden(ids_ST), "model.norm.weight")
        tied = self.config["tie_word_embeddings"]
        return hidden_STD @ self._get("model.embed_tokens" if tied else "lm_head").T

    def hidden(self, ids_ST: Tensor) -> Tensor:
        """What the last layer puts out, before the final norm: [S, T, D]."""
        hidden_STD = self._get("model.embed_tokens")[ids_ST]
        for layer in self.layers:
            hidden_STD = self._layer(layer, hidden_STD)
        return hidden_STD

    def wanda(self, ids_ST: Tensor, *, propagate: bool = True) -> Zeroed:
        """Zero patterns by Wanda's formula, from the trimmed and still dense layer.

        Args:
            ids_ST: Calibration tokens.
            propagate: Whether a layer is fed by slimmed layers, as it must be, or by
                dense ones (the reference code's defect).
        """
        zeroed = Zeroed({}, {})
        hidden_STD = self._get("model.embed_tokens")[ids_ST]
        for layer in self.layers:
            cut = self._cut(layer)
            if cut.action == "keep" and cut.sparsity > 0:
                x_ND = self._moe_input(layer, self._attend(layer, hidden_STD))
                masks = self._wanda_layer(layer, x_ND, zeroed.unseen)
                zeroed.masks[layer] = masks
                hidden_STD = self._layer(layer, hidden_STD, masks if propagate else [])
            else:
                hidden_STD = self._layer(layer, hidden_STD)
        return zeroed

    def _wanda_layer(
        self, layer: int, x_ND: Tensor, unseen: dict[int, list[int]]
    ) -> list[Expert]:
        cut, masks = self._cut(layer), []
        weight_NE = self._selection(layer, x_ND)
        for new, expert in enumerate(self._survivors(layer)):
            served = list(self._cluster(layer, new))
            x_nD = x_ND[(weight_NE[:, served] > 0).any(dim=1)]
            if len(x_nD) == 0:
                unseen.setdefault(layer, []).append(self._kept(layer)[new])
                masks.append(Expert(*(_lowest(m.abs(), cut.sparsity) for m in expert)))
                continue
            norm_D, norm_F = x_nD.norm(dim=0), expert.inner(x_nD).norm(dim=0)
            masks.append(
                Expert(
                    _lowest(expert.gate_FD.abs() * norm_D, cut.sparsity),
                    _lowest(expert.up_FD.abs() * norm_D, cut.sparsity),
                    _lowest(expert.down_DF.abs() * norm_F, cut.sparsity),
                )
            )
        return masks

    def _layer(
        self, layer: int, hidden_STD: Tensor, masks: list[Expert] | None = None
    ) -> Tensor:
        cut = self._cut(layer)
        if cut.action == "drop-block":
            return hidden_STD
        hidden_STD = self._attend(layer, hidden_STD)
        if cut.action == "drop-moe":
            return hidden_STD
        x_ND = self._moe_input(layer, hidden_STD)
        if cut.action == "drop-moe-keep-norm":
            return hidden_STD + x_ND.view_as(hidden_STD)
        weight_NE = self._selection(layer, x_ND)
        chosen_E = (weight_NE > 0).sum(dim=0)
        load = self.loads.setdefault(layer, [0] * len(self._kept(layer)))
        out_ND = torch.zeros_like(x_ND)
        for new, expert in enumerate(self._survivors(layer)):
            load[new] += int(chosen_E[list(self._cluster(layer, new))].sum())
            if masks:
                pairs = zip(expert, masks[new], strict=True)
                expert = Expert(*(matrix.masked_fill(m, 0) for matrix, m in pairs))
            for row in self._cluster(layer, new):
                out_ND += weight_NE[:, row : row + 1] * expert(x_ND)
        return hidden_STD + out_ND.view_as(hidden_STD)

    def _cut(self, layer: int) -> LayerCut:
        return self.cuts.get(layer, LayerCut())

    def _kept(self, layer: int) -> Ids:
        return self._cut(layer).kept(len(experts_of(self.stored, layer)))

    def _cluster(self, layer: int, new: int) -> Ids:
        """The router rows that lead to a survivor."""
        clusters = self._cut(layer).clusters
        if self.routing == "redirect" and clusters is not None:
            return clusters[new]
        return (self._kept(layer)[new],)

    def _survivors(self, layer: int) -> list[Expert]:
        experts = experts_of(self.stored, layer)
        kept = [experts[expert] for expert in self._kept(layer)]
        for new, (ids, weights) in enumerate(self._cut(layer).means()):
            members = zip(*(experts[expert] for expert in ids), strict=True)
            kept[new] = Expert(*(_mean(list(each), weights) for each in members))
        return [Expert(*(matrix.double() for matrix in expert)) for expert in kept]

    def _selection(self, layer: int, x_ND: Tensor) -> Tensor:
        """The weight of every expert for every token, 0 where it is not chosen."""
        cut = self._cut(layer)
        router_ED = router_of(self.stored, layer).clone()
        logits_NE = x_ND @ router_ED.double().T
        top_k = self.config["num_experts_per_tok"]
        if self.routing == "drop":
            means = zip(self._kept(layer), cut.means(), strict=False)
            for expert, (ids, weights) in means:
                mean_D = _mean([router_ED[member] for member in ids], weights)
                logits_NE[:, expert] = x_ND @ mean_D.double()
            barred = sorted(set(range(len(router_ED))) - set(self._kept(layer)))
            logits_NE[:, barred] = float("-inf")
            top_k = min(top_k, len(self._kept(layer)))
        best = logits_NE.softmax(dim=-1).topk(top_k, dim=-1)
        weight_NK = best.values / best.values.sum(dim=-1, keepdim=True)
        return torch.zeros_like(logits_NE).scatter(1, best.indices, weight_NK)

    def _moe_input(self, layer: int, hidden_STD: Tensor) -> Tensor:
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        return self._norm(hidden_STD, name).flatten(0, 1)

    def _attend(self, layer: int, hidden_STD: Tensor) -> Tensor:
        """Grouped-query attention with rotary positions, and the residual."""
        at = f"model.layers.{layer}."
        heads = self.config["num_attention_heads"]
        x_STD = self._norm(hidden_STD, at + "input_layernorm.weight")
        queries, keys, values = (
            self._heads(x_STD @ self._get(f"{at}self_attn.{name}_proj").T, heads)
            for name in "qkv"
        )
        queries, keys = self._rotated(queries), self._rotated(keys)
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        scores = scores.masked_fill(~self._visible(hidden_STD.shape[1]), float("-inf"))
        mixed = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        return hidden_STD + mixed @ self._get(f"{at}self_attn.o_proj").T

    def _heads(self, x_STD: Tensor, heads: int) -> Tensor:
        """[S, H, T, head size]; a head of keys or values serves several of queries."""
        size = self.config["hidden_size"] // heads
        split = x_STD.unflatten(2, (-1, size)).transpose(1, 2)
        return split.repeat_interleave(heads // split.shape[1], dim=1)

    def _rotated(self, x: Tensor) -> Tensor:
        length, size = x.shape[-2:]
        power = torch.arange(0, size, 2, dtype=torch.float64) / size
        angle = torch.arange(length)[:, None] * self.config["rope_theta"] ** -power
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def _visible(self, length: int) -> Tensor:
        at = torch.arange(length)
        distance = at[:, None] - at[None, :]
        window = self.config["sliding_window"] or length
        return (distance >= 0) & (distance < window)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (
            x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        ).rsqrt()
        return x * scale * self.tensors[name]

    def _get(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]


def _lowest(score_RC: Tensor, sparsity: float) -> Tensor:
    """True at the lowest ``int(C * sparsity)`` scores of each row."""
    count = int(score_RC.shape[1] * sparsity + 1e-9)
    order = score_RC.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(score_RC, dtype=torch.bool).scatter(1, order, value=True)


def _mean(tensors: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """The mean, rounded to the stored dtype."""
    pairs = zip(tensors, weights, strict=True)
    total = torch.stack([tensor.double() * weight for tensor, weight in pairs]).sum(0)
    return total.to(tensors[0].dtype)
