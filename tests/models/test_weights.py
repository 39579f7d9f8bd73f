"""The digest of a model's weights: plain, quantised, packed, in tensor subclasses; and of what is no tensor."""

import dataclasses
import enum
import hashlib
import io

import crc32c
import pytest
import torch
from torch import nn

import mmcache
import small_models
from mmcache.errors import UnsupportedModelError
from mmcache.models.identity import weights_digest

QUANTISED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class _Zero(enum.Enum):
    INT = 1
    FLOAT = 2


@dataclasses.dataclass(frozen=True)
class _Tiles:
    size: int


class Quantised(torch.Tensor):
    """As torchao's tensors: integers and a scale that look like float32, and have no storage of their own."""

    @staticmethod
    def __new__(cls, numbers, _scale, _said=None):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32, device=numbers.device)

    def __init__(self, numbers, scale, said=None):
        self.numbers, self.scale, self.said = numbers, scale, said

    def __tensor_flatten__(self):
        return ["numbers", "scale"], [self.said, self.dtype]

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].numbers, args[0].scale, args[0].said)
        plain = [value.numbers * value.scale if isinstance(value, cls) else value for value in args]
        if func in (torch.ops.aten.view.default, torch.ops.aten.view.dtype, torch.ops.aten.alias.default):
            raise NotImplementedError(f"{func} is not implemented")
        return func(*plain, **(kwargs or {}))


class Closed(Quantised):
    """A tensor that cannot be taken apart."""

    __tensor_flatten__ = property(lambda self: self._nothing)


def of_state(**state):
    """A model whose state dict is this."""
    model = nn.Module()
    model.state_dict = lambda: state
    return weights_digest(model)


def quantise(model, *kinds, dtype=torch.qint8):
    return torch.ao.quantization.quantize_dynamic(model, set(kinds), dtype=dtype)


def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"linear": nn.Linear(8, 8), "lstm": nn.LSTM(8, 8), "norm": nn.LayerNorm(8)})


def test_plain_weights_have_the_digest_that_stores_were_made_with():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    lines = [
        f"{name} torch.bfloat16 {shape} {crc32c.crc32c(value.view(torch.int16).numpy().tobytes()):08x}\n"
        for name, value, shape in (("bias", model.bias.detach(), (2,)), ("weight", model.weight.detach(), (2, 3)))
    ]
    assert weights_digest(model) == hashlib.sha256("".join(lines).encode()).hexdigest()


@QUANTISED
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_packed_weights_are_read(dtype):
    digests = []
    for change in (None, "linear.weight", "linear.bias", "lstm.weight_hh_l0"):
        model = network()
        if change:
            model.get_parameter(change).data.view(-1)[0] += 1
        packed = quantise(model, nn.Linear, nn.LSTM, dtype=dtype)
        assert weights_digest(packed) == weights_digest(packed)
        digests.append(weights_digest(packed))
    assert len(set(digests)) == 4


@QUANTISED
def test_the_scale_of_quantised_weights_counts():
    numbers, zeros = torch.ones(2, 4), torch.zeros(2)
    one = torch.quantize_per_tensor(numbers, 0.5, 0, torch.qint8)
    other = torch.quantize_per_tensor(numbers * 2, 1.0, 0, torch.qint8)
    assert torch.equal(one.int_repr(), other.int_repr())
    assert of_state(x=one) != of_state(x=other)
    one = torch.quantize_per_channel(numbers, torch.tensor([0.5, 0.25]), zeros, 0, torch.qint8)
    other = torch.quantize_per_channel(numbers, torch.tensor([0.5, 0.5]), zeros, 0, torch.qint8)
    assert of_state(x=one) != of_state(x=other)


def test_a_tensor_subclass_is_taken_apart():
    def digest(*values):
        return of_state(x=Quantised(*values))

    numbers, scale = torch.arange(4, dtype=torch.int8), torch.tensor(0.5)
    whole = digest(numbers, scale, {"tiles": _Tiles(8), "zero": _Zero.INT})
    assert whole == digest(numbers.clone(), scale.clone(), {"tiles": _Tiles(8), "zero": _Zero.INT})
    others = [
        digest(numbers + 1, scale, {"tiles": _Tiles(8), "zero": _Zero.INT}),
        digest(numbers, scale * 2, {"tiles": _Tiles(8), "zero": _Zero.INT}),
        digest(numbers, scale, {"tiles": _Tiles(16), "zero": _Zero.INT}),
        digest(numbers, scale, {"tiles": _Tiles(8), "zero": _Zero.FLOAT}),
    ]
    assert len({whole, *others}) == 5


def test_a_tensor_subclass_with_bytes_of_its_own_is_read_as_it_is():
    class Named(torch.Tensor):
        pass

    assert of_state(x=torch.ones(3).as_subclass(Named)) == of_state(x=torch.ones(3))


@pytest.mark.parametrize(
    "made",
    [
        lambda rows: rows.to_sparse(),
        lambda rows: rows.to_sparse_csr(),
        lambda rows: rows.to_sparse_csc(),
        lambda rows: rows.to_sparse_bsr((2, 2)),
        lambda rows: torch.complex(rows, rows).conj(),
        lambda rows: rows.to(torch.float8_e4m3fn),
        lambda rows: {"a": [rows, (1, "x")]},
        lambda rows: io.BytesIO(rows.numpy().tobytes()),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_other_layouts_and_extra_state_count(made):
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    same, other = made(rows.clone()), made(rows.flip(0))
    assert of_state(x=made(rows)) == of_state(x=same) != of_state(x=other)


def test_an_object_of_a_kind_that_is_not_known_does_not_change_the_digest_from_run_to_run():
    assert of_state(x=object()) == of_state(x=object())


def test_weights_that_cannot_be_read_are_named():
    with pytest.raises(UnsupportedModelError, match=r"weight x is a Closed whose numbers cannot be read: NotImpl"):
        of_state(x=Closed(torch.ones(2), torch.ones(())))
    with pytest.raises(UnsupportedModelError, match="weight x is on no device"):
        of_state(x=torch.ones(2, device="meta"))


@QUANTISED
def test_a_model_that_was_quantised_runs(tmp_path):
    model = quantise(small_models.llama(), nn.Linear)
    with mmcache.extract(
        model, small_models.byte_tokenizer(), ["some text"], tmp_path / "store", dtype="float32"
    ) as store:
        rows = store["mlp_out"].get_layer(2)
    with mmcache.capture(model) as captured, torch.inference_mode():
        model(torch.tensor([[256, *b"some text"]]))
    torch.testing.assert_close(rows, captured["mlp_out"][2][0], rtol=1e-4, atol=1e-5)


def test_a_model_of_tensor_subclasses_runs(tmp_path):
    model = small_models.llama()
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach()
        scale = weight.abs().max() / 127
        wrapped = Quantised((weight / scale).round().to(torch.int8), scale)
        layer.mlp.down_proj.weight = nn.Parameter(wrapped, requires_grad=False)
    with mmcache.extract(
        model, small_models.byte_tokenizer(), ["some text"], tmp_path / "store", device="cpu"
    ) as store:
        assert store.n_tokens == 10
    # The same model again is the same one.
    mmcache.extract(model, small_models.byte_tokenizer(), ["some text"], tmp_path / "store").close()
