"""`unbinarize_` gives the float network back, whatever surgery did and whatever came after."""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl

ROUND_TRIPS = {
    "resnet18": {},
    "test_efficientnet_evos": {},
    "test_resnet": {"policy": "reactnet"},
    "test_nfnet": {"companion": "rprelu"},
    "test_vit": {"weight": "learned", "learn_kernel": True},
    "eva02_tiny_patch14_224": {"weight": "recu"},
    "mobileone_s0": {"policy": "everything"},
    "resnetv2_50d_frn": {},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_outputs_and_classes_are_those_of_the_float_network(name: str) -> None:
    model = build(name)
    original = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = dl.binarize_(model, dl.BinaryConfig(**ROUND_TRIPS[name]))
    names = dl.unbinarize_(model)
    assert set(names) == {row.name for row in report.rows if row.before != row.after}
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.state_dict().keys() == original.state_dict().keys()
    size = model.pretrained_cfg["input_size"][-1] if "eva" in name or "test_vit" in name else 64
    x = torch.randn(2, 3, size, size)
    assert torch.equal(model(x), original(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_trained_is_in_the_float_network_and_it_can_be_binarized_again() -> None:
    model = build("resnetv2_50d_frn")
    dl.binarize_(model)
    model = copy.deepcopy(model).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    dl.unbinarize_(model)
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], value) for n, value in trained.items() if n in state)
    assert {p.dtype for p in model.stages[0].parameters()} <= {torch.float64, torch.float32}
    assert all(m.training for m in model.modules())
    model.float()
    with pytest.raises(ValueError, match="has no binary layer"):
        dl.unbinarize_(model)
    assert dl.binarize_(model).binary


def test_a_pickled_network_can_be_unbinarized() -> None:
    model = build("test_resnet")
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    dl.binarize_(model, dl.BinaryConfig(policy="reactnet"))
    again = pickle.loads(pickle.dumps(model))
    dl.unbinarize_(again)
    assert torch.equal(again(x), expected)


def test_a_layer_that_was_built_binary_becomes_float() -> None:
    layer = dl.BinaryConv2d(4, 8, 3, activation=dl.Sign())
    model = nn.Sequential(layer, dl.BinaryLinear(8, 2, activation=None))
    assert dl.unbinarize_(model) == ("0", "1")
    assert [type(m) for m in model] == [nn.Conv2d, nn.Linear]
    assert model[0].weight is layer.weight
    assert "activation" not in dict(model[0].named_modules())


def test_a_shared_layer_is_put_back_in_all_of_its_places() -> None:
    shared = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.ReLU(), shared, nn.Conv2d(8, 2, 1))
    dl.binarize_(model, example_input=(2, 3, 8, 8))
    dl.unbinarize_(model)
    assert model[1] is model[3]
    assert type(model[1]) is nn.Conv2d


@pytest.mark.parametrize("name", ["mobileone_s0", "repvit_m0_9", "fastvit_t8", "levit_128s"])
def test_folding_binary_layers_into_float_ones_is_refused(name: str) -> None:
    from timm.utils.model import reparameterize_model

    model = build(name)
    dl.binarize_(model)
    with pytest.raises(ValueError, match="would fold binary layers into a float one"):
        reparameterize_model(copy.deepcopy(model))
    dl.unbinarize_(model)
    size = 224 if name == "levit_128s" else 64
    x = torch.randn(2, 3, size, size)
    assert torch.allclose(reparameterize_model(model)(x), model(x), atol=1e-2)


class Autoencoder(nn.Module):
    """A variational one, whose method has a name that RepVGG uses for another thing; and one that is such a thing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.decoder = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 8)

    def reparameterize(self, mean: Tensor, spread: Tensor) -> Tensor:
        return mean + spread * 0.5

    def fuse(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)

    def switch_to_deploy(self) -> None:
        self.encoder = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.fuse(self.reparameterize(*self.encoder(self.stem(x)).chunk(2, 1))))


def test_methods_that_fold_nothing_stay() -> None:
    model = Autoencoder()
    dl.binarize_(model, example_input=torch.randn(4, 8))
    assert model(torch.randn(4, 8)).shape == (4, 8)
    with pytest.raises(ValueError, match=r"the model\.switch_to_deploy\(\) would fold binary layers"):
        model.switch_to_deploy()
    dl.unbinarize_(model)
    assert "switch_to_deploy" not in vars(model)


def test_what_only_the_original_has_follows_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    dl.binarize_(model, example_input=(2, 3, 8, 8))
    model.double()
    dl.unbinarize_(model)
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    evo = build("test_efficientnet_evos")
    dl.binarize_(evo)
    evo.bfloat16()
    dl.unbinarize_(evo)
    assert {p.dtype for p in evo.parameters()} == {torch.bfloat16}


def test_binarized_on_meta_and_given_storage_since() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_efficientnet_evos")
    dl.binarize_(model)
    source = timm.create_model("test_efficientnet_evos")
    dl.binarize_(source)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    dl.unbinarize_(model)
    assert not any(t.is_meta for t in model.state_dict().values())
    model(torch.randn(2, 3, 64, 64))


def test_handles_of_hooks_still_remove_them() -> None:
    model = build("test_resnet")
    calls: list[int] = []
    dl.binarize_(model)
    handle = model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    dl.unbinarize_(model)
    model(torch.randn(2, 3, 64, 64))
    handle.remove()
    model(torch.randn(2, 3, 64, 64))
    assert len(calls) == 1
