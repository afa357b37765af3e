"""Dropout and BatchNorm on models as people write them: the layer in its right place, or a clear refusal."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import goodfit as gf
from goodfit import BatchNorm, Dropout, GoodfitError, Run
from goodfit.fitting.data import mapped
from goodfit.layers.dropout import SeededDropout
from goodfit.noise import Clock
from goodfit.surgery.running import call_model
from nets import Net

ROWS, SERIES, IMAGES = torch.randn(4, 6), torch.randn(4, 5, 6), torch.randn(2, 3, 8, 8)

EVERY = [Dropout(0.5), BatchNorm(), gf.ChannelDropout(), gf.AlphaDropout(), gf.GaussianDropout(), gf.DropBlock()]
EVERY += [gf.InputDropout()]


class NormAct(nn.BatchNorm2d):
    """A norm that holds its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Own(nn.Module):
    """A linear layer that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


def mlp(activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), activation or nn.ReLU(), nn.Linear(8, 1))


def added(model: nn.Module, one: gf.phases.Build, example: Any) -> list[str]:
    """Names of the layers that building adds; the model then runs in both modes."""
    before = {id(m) for m in model.modules()}
    one.build(model, example)
    call_model(model.train(), example)
    call_model(model.eval(), example)
    return [name for name, m in model.named_modules() if id(m) not in before]


def lin(*sizes: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(i, o) for name, i, o in zip("abcdef", sizes, sizes[1:], strict=False)}


def conv(*sizes: int) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(i, o, 3, padding=1) for name, i, o in zip("abcdef", sizes, sizes[1:], strict=False)}


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.act(m.a(x))
    out = m.b(x)
    out += x
    return m.c(m.act(out))


def unet(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = F.relu(m.b(F.max_pool2d(a, 2)))
    return m.c(torch.cat([F.relu(m.up(b)), a], 1))


def squeeze(m: Any, x: Tensor) -> Tensor:
    x = m.r(m.a(x))
    s = torch.sigmoid(m.g(F.relu(m.f(x.mean((2, 3))))))
    return m.b(x * s[:, :, None, None])


def heads(m: Any, x: Tensor) -> Any:
    h = torch.tanh(m.a(x))
    return m.sigmoid(m.b(h)), m.softplus(m.c(h))


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 5)
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + m.b(h))
    return m.c(h)


def view_changed(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.view(-1).add_(x.mean())
    return m.b(F.relu(h))


def two_inputs(m: Any, u: Tensor, v: Tensor) -> dict[str, Any]:
    return {"out": m.c(torch.cat([F.relu(m.a(u)), m.b(v).tanh()], 1)), "n": 3}


CELLS = {**lin(6, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 1)}
PAIR = {"a": nn.Linear(6, 4), "b": nn.Linear(3, 4), "c": nn.Linear(8, 1)}
UNET = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 8, 3, padding=1), "up": nn.ConvTranspose2d(8, 4, 2, 2)}
SQUEEZE = {"a": nn.Conv2d(3, 8, 3), "r": nn.ReLU(), "f": nn.Linear(8, 4), "g": nn.Linear(4, 8), "b": nn.Conv2d(8, 2, 3)}
LSTM = {"l": nn.LSTM(6, 5, batch_first=True), "a": nn.Linear(5, 4), "b": nn.Linear(4, 1)}
HEADS = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 2), "c": nn.Linear(8, 2), "sigmoid": nn.Sigmoid(), "softplus": nn.Softplus()}
GLU = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "c": nn.Linear(8, 1), "act": nn.SiLU()}
NORMED = {**conv(3, 4), "act": nn.ReLU(), "norm": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 4, 3), "c": nn.Conv2d(4, 1, 1)}
SHARED_ACT = {**conv(3, 8, 8, 2), "act": nn.ReLU(inplace=True)}

LAYERNORM = {**lin(6, 8, 1), "norm": nn.LayerNorm(8)}

# model, example, where Dropout goes, where BatchNorm goes (None: refused)
PLACES: dict[str, tuple[Any, Any, list[str] | None, list[str] | None]] = {
    "modules": (mlp(), ROWS, ["1"], ["0"]),
    "function": (Net(lambda m, x: m.b(F.relu(m.a(x))), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "method": (Net(lambda m, x: m.b(m.a(x).relu()), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "in place": (Net(lambda m, x: m.b(m.a(x).relu_()), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "keyword": (Net(lambda m, x: m.b(input=torch.tanh(m.a(x))), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "no-op between": (Net(lambda m, x: m.b(m.a(x).contiguous().relu()), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "activation at the end": (nn.Sequential(*mlp(), nn.Sigmoid()), ROWS, ["1"], ["0"]),
    "two heads": (Net(heads, **HEADS), ROWS, ["b", "c"], ["a"]),
    "residual, one shared activation": (Net(residual, **SHARED_ACT), IMAGES, ["act"], ["a"]),
    "u-net": (Net(unet, **UNET, c=nn.Conv2d(8, 1, 1)), IMAGES, ["b", "up", "c"], ["a", "b", "up"]),
    "squeeze and excite": (Net(squeeze, **SQUEEZE), IMAGES, ["r", "g"], ["a"]),
    "gated": (Net(lambda m, x: m.c(m.act(m.a(x)) * m.b(x)), **GLU), ROWS, ["c"], ["a"]),
    "own swish": (Net(lambda m, x: m.b(torch.sigmoid(h := m.a(x)) * h), **lin(6, 8, 1)), ROWS, ["b"], ["a"]),
    "lstm head": (Net(lambda m, x: m.b(F.relu(m.a(m.l(x)[0][:, -1]))), **LSTM), SERIES, ["b"], ["a"]),
    "before an lstm": (Net(lambda m, x: m.l(F.relu(m.a(x)))[0], a=nn.Linear(6, 6), l=LSTM["l"]), SERIES, ["l"], None),
    "recurrent by hand": (Net(recurrent, **CELLS), SERIES, ["c"], None),
    "shared layer": (Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), **lin(6, 6, 1)), ROWS, ["b"], ["a"]),
    "shared, once bare": (Net(lambda m, x: m.b(m.a(F.relu(m.a(x)))), **lin(6, 6, 1)), ROWS, None, None),
    "tuple in, dict out": (Net(two_inputs, **PAIR), (ROWS, ROWS[:, :3]), ["c"], ["a", "b"]),
    "dict in": (Net(two_inputs, **PAIR), {"u": ROWS, "v": ROWS[:, :3]}, ["c"], ["a", "b"]),
    "norm behind": (Net(lambda m, x: m.c(m.act(m.b(m.norm(m.act(m.a(x)))))), **NORMED), IMAGES, ["c"], ["b"]),
    "norm before": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), ROWS, ["2"], None),
    "norm beside": (Net(lambda m, x: m.b(F.relu(h := m.a(x)) + m.norm(h)), **LAYERNORM), ROWS, ["b"], None),
    "norm and layer behind": (Net(lambda m, x: m.b(h := F.relu(m.a(x))) + m.norm(h), **LAYERNORM), ROWS, None, None),
    "changed through a view": (Net(view_changed, **lin(6, 8, 1)), ROWS, ["b"], None),
    "norm as a function": (Net(lambda m, x: m.b(F.layer_norm(F.relu(m.a(x)), (8,))), **lin(6, 8, 1)), ROWS, None, None),
    "own layer behind": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Own()), ROWS, ["1"], ["0"]),
    "norm with its activation in it": (
        nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 2, 3)), IMAGES, ["1.act"], None),
    "rank 3": (nn.Sequential(nn.Conv1d(8, 4, 3), nn.PReLU(), nn.ConvTranspose1d(4, 2, 3)), IMAGES[:, 0], ["1"], ["0"]),
    "rank 5": (nn.Sequential(nn.Conv3d(3, 4, 1), nn.GELU(), nn.Conv3d(4, 2, 1)), IMAGES[..., None], ["1"], ["0"]),
    "weight norm": (nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)), ROWS, ["1"], ["0"]),
    "lazy": (nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(1)), ROWS, ["1"], ["0"]),
    "no activation": (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)), ROWS, None, None),
}  # fmt: skip


def fresh(case: str) -> tuple[nn.Module, Any]:
    model, example, *_ = PLACES[case]
    return copy.deepcopy(model).double(), mapped(example, Tensor.double)


@pytest.mark.parametrize("case", PLACES)
def test_dropout_goes_behind_activations_that_come_to_a_layer(case: str) -> None:
    (model, example), places = fresh(case), PLACES[case][2]
    if places is None:
        with pytest.raises(GoodfitError, match="Dropout found no activation with a layer behind it in"):
            Dropout(0.5).build(model, example)
    else:
        assert [name.rpartition(".")[0] for name in added(model, Dropout(0.5), example)] == places


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.filterwarnings("ignore:BatchNorm leaves out")
def test_batchnorm_goes_between_a_layer_and_its_activation(case: str) -> None:
    (model, example), places = fresh(case), PLACES[case][3]
    if places is None:
        with pytest.raises(GoodfitError, match="BatchNorm found no linear or convolution in"):
            BatchNorm().build(model, example)
    else:
        assert added(model, BatchNorm(), example) == [f"{name}.batchnorm" for name in places]


ACTIVATIONS = (
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 RReLU SELU SiLU "
    "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
)


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_every_activation_of_torch_is_known(name: str) -> None:
    width = 4 if name == "GLU" else 8
    for one, place in ((Dropout(0.5), "1.dropout"), (BatchNorm(), "0.batchnorm")):
        model = nn.Sequential(nn.Linear(6, 8), getattr(nn, name)(), nn.Linear(width, 1))
        assert added(model, one, torch.randn(4, 6)) == [place]


TINY: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
WORDS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
RESNET = ["embedder.embedder.activation.dropout"]
RESNET += [f"encoder.stages.{s}.activation.dropout" for s in ("0.layers.0.layer.0", "0.layers.0", "1.layers.0.layer.0")]
DOWN = "model.layers.0.mlp.down_proj.dropout"


def pictures(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def peer(kind: str) -> tuple[nn.Module, Any]:
    t = transformers
    resnet = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    swin = t.SwinConfig(image_size=16, patch_size=4, embed_dim=4, depths=[1], num_heads=[1], window_size=2)
    made: dict[str, Callable[[], tuple[Any, Any]]] = {
        "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(vocab_size=9, **TINY)), WORDS),
        "gpt2": lambda: (t.GPT2LMHeadModel(t.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=4)), WORDS),
        "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(vocab_size=9, num_key_value_heads=2, **TINY)), WORDS),
        "t5": lambda: (
            t.T5EncoderModel(t.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)),
            WORDS,
        ),
        "vit": lambda: (t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **TINY)), pictures(16)),
        "clip": lambda: (t.CLIPVisionModel(t.CLIPVisionConfig(image_size=16, patch_size=8, **TINY)), pictures(16)),
        "swin": lambda: (t.SwinModel(swin), pictures(16)),
        "resnet": lambda: (t.ResNetModel(resnet), pictures(32)),
        "convnext": lambda: (t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[4], depths=[1], num_stages=1)), pictures(16)),
    }
    model, example = made[kind]()
    return model.double().train(), mapped(example, lambda x: x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize(
    ("kind", "dropouts", "norms"),
    [
        ("bert", [], ["bert.pooler.dense.batchnorm"]),  # their own dropout gets the rate
        ("gpt2", [], None),
        ("llama", [DOWN], None),  # behind the gated product, not in the gate; its own RMSNorm is known as a norm
        ("t5", [], None),
        ("vit", [], None),
        ("clip", ["encoder.layers.0.mlp.fc2.dropout"], None),  # its own x * sigmoid(1.702 x)
        ("swin", [], None),
        ("resnet", RESNET, None),
        ("convnext", ["encoder.stages.0.layers.0.act.dropout"], None),
    ],
)
@pytest.mark.filterwarnings("ignore:BatchNorm leaves out")
def test_transformers_models_get_it_right_or_refuse(kind: str, dropouts: list[str], norms: list[str] | None) -> None:
    model, example = peer(kind)
    assert added(model, Dropout(0.3), example) == dropouts
    assert {m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)} == {0.3}
    model, example = peer(kind)
    if norms is None:
        with pytest.raises(GoodfitError, match="BatchNorm found no linear or convolution"):
            BatchNorm().build(model, example)
    else:
        assert added(model, BatchNorm(), example) == norms


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"])
def test_a_model_with_dropout_layers_gets_their_rate_set_and_nothing_inserted(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), getattr(nn, name)(0.1), nn.Linear(8, 1))
    modules = list(model.modules())
    Dropout(0.4).build(model, torch.randn(4, 6))
    assert list(model.modules()) == modules
    assert model[2].p == 0.4


def test_dropout_by_a_function_gets_the_rate_unless_it_is_off() -> None:
    def net(p: float) -> nn.Module:
        return Net(lambda m, x: m.b(F.dropout(F.relu(m.a(x)), p, m.training)), **lin(6, 800, 1))

    model = net(0.3)
    assert added(model, Dropout(0.9), torch.randn(4, 6)) == []
    seen: list[Tensor] = []
    model.b.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.a.bias.data.fill_(100)
    model.train()(torch.zeros(4, 6))
    assert abs(float((seen[0] == 0).double().mean()) - 0.9) < 0.03
    model.eval()(torch.zeros(4, 6))
    assert bool((seen[1] > 0).all())
    assert added(net(0.0), Dropout(0.5), torch.randn(4, 6)) == ["b.dropout"]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_units_are_scaled_by_one_over_one_minus_p(p: float, dtype: torch.dtype) -> None:
    layer = SeededDropout(p=p).train().to(dtype)
    x = (torch.rand(200, 200) + 1).to(dtype)
    y = layer(x)
    kept = y != 0
    assert layer.p == p
    assert y.dtype == dtype
    half = dtype.itemsize == 2  # computed in single precision: only the result is rounded
    rounding = torch.finfo(dtype).eps * (0.51 if half else 1.01)
    torch.testing.assert_close(y[kept].double(), x[kept].double() / (1 - p), rtol=rounding, atol=0)
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / x.numel())
    assert layer.eval()(x) is x


def test_masks_are_a_function_of_seed_name_step_and_call_alone() -> None:
    def mask(seed: int = 1, name: str = "a", step: int = 0, call: int = 0) -> Tensor:
        layer = SeededDropout(p=0.5).train()
        layer.bind(name, seed, Clock(step=step))
        torch.rand(step + call)  # torch's generator is elsewhere
        return [layer(torch.ones(64)) for _ in range(call + 1)][-1]

    assert torch.equal(mask(), mask())
    others = [mask(), mask(seed=2), mask(name="b"), mask(step=1), mask(call=1)]
    assert len({tuple(m.tolist()) for m in others}) == 5
    before = torch.get_rng_state()
    mask()
    assert torch.equal(before, torch.get_rng_state())


def test_a_schedule_moves_the_rate_by_steps() -> None:
    model = mlp()
    run = Run(Dropout(gf.schedules.linear(0.0, 0.5, steps=4)), model, example=torch.randn(4, 6), task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = []
    for _ in range(6):
        rates.append(model[1].dropout.p)
        run.loss(torch.randn(4, 6), torch.randn(4)).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_built_model_is_copied_whole(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = mlp(), torch.randn(64, 6)
    Run((BatchNorm(), Dropout(0.5)), model, example=x, seed=3)
    other = copied(model)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(model.train()(x), other.train()(x))
    assert not torch.equal(other(x), other.eval()(x))
    assert other[1].dropout is not model[1].dropout
    other[1].dropout.p = 0.1
    assert model[1].dropout.p == 0.5


def test_dropout_leaves_the_state_dict_alone_and_batchnorm_adds_only_its_own() -> None:
    plain, x = mlp(), torch.randn(4, 6)
    dropped = Dropout(0.5).build(copy.deepcopy(plain), x)
    dropped.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropped.state_dict())
    normed = BatchNorm().build(mlp(), x)
    missing, unexpected = normed.load_state_dict(plain.state_dict(), strict=False)
    own = {f"0.batchnorm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(normed.state_dict()) == set(plain.state_dict()) | own
    assert set(missing) <= own  # torch does not miss num_batches_tracked
    assert unexpected == []
    assert torch.equal(normed[0].weight, plain[0].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batchnorm_is_torchs_layer_with_these_numbers_like_its_host(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)).to(dtype)
    model[0].eval()
    one = BatchNorm(momentum=0.3, eps=1e-3, affine=False, track_running_stats=True)
    norm = one.build(model, torch.randn(2, 3, 8, 8, dtype=dtype))[0].batchnorm
    assert type(norm) is nn.BatchNorm2d
    assert (norm.num_features, norm.momentum, norm.eps, norm.weight) == (4, 0.3, 1e-3, None)
    assert norm.running_mean.dtype == dtype
    assert not norm.training
    untracked = BatchNorm(track_running_stats=False).build(mlp(), torch.randn(4, 6))[0].batchnorm
    assert untracked.running_mean is None
    assert untracked.weight.shape == (8,)


def test_batchnorm_computes_what_the_same_net_with_the_layer_written_in_computes() -> None:
    model, x = mlp(), torch.randn(16, 6)
    by_hand = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(8), nn.ReLU(), copy.deepcopy(model[2]))
    BatchNorm().build(model, x)
    assert torch.equal(model(x), by_hand(x))
    assert torch.equal(model.eval()(x), by_hand.eval()(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), (4, 5, 6)),  # features last
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)), (3, 8, 8)),  # no batch axis
    ],
)
def test_an_output_without_channels_on_axis_1_is_left_out_aloud(model: nn.Module, shape: tuple[int, ...]) -> None:
    tail = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.LazyLinear(2), nn.ReLU(), nn.Linear(2, 1))
    net = Net(lambda m, x: m.tail(m.head(x)), head=copy.deepcopy(model), tail=tail).double()
    with pytest.warns(gf.GoodfitWarning, match=r"BatchNorm leaves out head\.0: its output of shape"):
        BatchNorm().build(net, torch.randn(shape))
    assert [n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm1d)] == ["tail.2.batchnorm"]


@pytest.mark.parametrize("one", [Dropout(0.5), BatchNorm()])
def test_building_leaves_all_else_as_it_was(one: gf.phases.Build) -> None:
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(1), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    model[3].eval()
    model[4][0].eval()
    x = torch.randn(4, 6)
    model(x).sum().backward()

    def seen() -> list[Any]:
        modes = [(n, m.training) for n, m in model.named_modules() if not isinstance(m, SeededDropout) and "batchnorm" not in n]
        tensors = [t.clone() for n, t in model.state_dict().items() if "batchnorm" not in n]
        grads = [p.grad.clone() for n, p in model.named_parameters() if "batchnorm" not in n]
        return [modes, *tensors, *grads, torch.get_rng_state()]

    before = seen()
    one.build(model, x)
    assert before[0] == seen()[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1:], seen()[1:], strict=True))
    assert not any(p.requires_grad and p.grad is None for n, p in model.named_parameters() if "batchnorm" not in n)


@pytest.mark.parametrize("one", EVERY)
def test_a_model_that_fails_on_the_example_is_left_as_it_was_and_named(one: gf.phases.Build) -> None:
    model = mlp()
    model[2].eval()
    with pytest.raises(GoodfitError, match=r"Sequential must run on the example .* got RuntimeError: mat1 and mat2 shapes"):
        one.build(model, torch.randn(4, 5))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(list(model.modules())) == 4


def wrapped(how: str) -> nn.Module:
    if how == "compiled in place":
        model = mlp()
        model.compile(backend="eager")
        return model
    if how == "DDP":  # its constructor wants a process group
        return nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    make: dict[str, Any] = {
        "DataParallel": nn.DataParallel,
        "compiled": lambda m: torch.compile(m, backend="eager"),
        "script": torch.jit.script,
    }
    return make[how](mlp())


@pytest.mark.parametrize("one", EVERY)
@pytest.mark.parametrize("how", ["DataParallel", "DDP", "compiled", "compiled in place", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_refused(one: gf.phases.Build, how: str) -> None:
    with pytest.raises(GoodfitError, match=r"edits the model in place, got a .*: give the model first"):
        one.build(wrapped(how), torch.randn(4, 6))


@pytest.mark.parametrize("one", EVERY)
def test_a_bare_leaf_is_refused(one: gf.phases.Build) -> None:
    with pytest.raises(GoodfitError, match=r"got a single Linear; wrap it in nn\.Sequential"):
        one.build(nn.Linear(6, 1), torch.randn(4, 6))


def test_building_twice_adds_no_second_layer() -> None:
    x = torch.randn(4, 6)
    normed = BatchNorm().build(mlp(), x)
    assert added(normed, BatchNorm(), x) == []
    dropped = Dropout(0.2).build(mlp(), x)
    assert added(dropped, Dropout(0.3), x) == []
    assert dropped[1].dropout.p == 0.3


@pytest.mark.parametrize("order", [(BatchNorm(), Dropout(0.5)), (Dropout(0.5), BatchNorm())])
def test_both_together_in_either_order(order: tuple[gf.phases.Build, ...]) -> None:
    for net in (mlp(), Net(lambda m, x: m.b(F.relu(m.a(x))), **lin(6, 8, 1))):
        names = {n for one in order for n in added(net, one, torch.randn(4, 6))}
        assert names in ({"0.batchnorm", "1.dropout"}, {"a.batchnorm", "b.dropout"})


def test_a_transformer_layer_of_torch_has_its_rates_set_and_runs_in_both_modes() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 1))
    assert added(model, Dropout(0.3), torch.randn(2, 5, 6)) == []
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.body(x))


@pytest.mark.parametrize(
    ("cocktail", "kind"), [("DropPath(0.5)", "SeededDropPath"), ("InputDropout(0.5)", "SeededInputDropout")]
)
def test_what_is_hung_into_a_container_is_run_once(cocktail: str, kind: str) -> None:
    for model in (nn.Sequential(Adds(), nn.Linear(2, 3)), nn.Sequential(nn.Linear(4, 4), Adds())):
        gf.Run(cocktail, model, example=torch.ones(6, 4))
        layer = next(m for m in model.modules() if type(m).__name__ == kind)
        runs: list[Any] = []
        layer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        outputs = model.train()(torch.ones(64, 4))
        assert len(runs) == 1
        assert bool((outputs != 0).all())
