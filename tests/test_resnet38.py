from __future__ import annotations

import pytest
import reference_resnet38 as reference
import torch
from tiny_models import pixels

from bitrans_hf.hub.resnet38 import STAGES, TAP_CHANNELS, TAP_STRIDES, TAPS, ResNet38


@pytest.fixture(scope="module")
def whole() -> ResNet38:
    """The published width, on the meta device: shapes and no memory."""
    with torch.device("meta"):
        return ResNet38().eval()


def test_the_published_network_has_its_number_of_parameters(whole: ResNet38):
    assert sum(parameter.numel() for parameter in whole.parameters()) == 105_070_912


def test_every_tensor_has_the_public_name_and_shape(whole: ResNet38):
    ours = {
        name: tuple(value.shape) for name, value in whole.state_dict().items() if "num_batches_tracked" not in name
    }
    assert ours == reference.shapes()


@pytest.mark.parametrize("size", [(321, 448), (37, 100), (8, 1)])
def test_every_layer_has_the_published_channels_and_stride(whole: ResNet38, size: tuple[int, int]):
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: tuple(output[0].shape)})
        )
        for name, module in whole.named_children()
        if name in reference.BLOCKS or name in reference.BOTTLENECKS
    ]
    taps = whole(torch.empty(2, 3, *size, device="meta"))
    for hook in hooks:
        hook.remove()
    h, w = size
    expected = {}
    for name, (_, _, channels, stride, _) in reference.BLOCKS.items():
        h, w = -(-h // stride), -(-w // stride)
        expected[name] = (2, channels, h, w)
    expected |= {"b6": (2, 2048, h, w), "b7": (2, 4096, h, w)}
    assert seen == expected
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {
        name: (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        for name, channels, stride in zip(TAPS, TAP_CHANNELS, TAP_STRIDES, strict=True)
    }


def test_stages_hold_every_module_once(whole: ResNet38):
    assert [name for stage in STAGES for name in stage] == [name for name, _ in whole.named_children()]


@pytest.mark.parametrize("size", [(64, 64), (41, 59)])
def test_the_maps_are_those_of_a_plain_transcription(size: tuple[int, int]):
    state = reference.state()
    model = ResNet38(width_multiplier=1 / 32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = pixels(2, 3, *size)
    with torch.no_grad():
        ours, theirs = model(images), reference.trunk(state, images)
    for name in TAPS:
        assert theirs[name].std() > 0.05  # else this would show nothing
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_dropout_hides_whole_channels_in_training_alone():
    model = ResNet38(width_multiplier=1 / 16)
    assert (model.b6.dropout_2b1.p, model.b6.dropout_2b2.p) == (0.3, 0.3)
    assert (model.b7.dropout_2b1.p, model.b7.dropout_2b2.p) == (0.5, 0.5)
    seen = []
    model.b7.dropout_2b2.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    torch.manual_seed(0)
    model(pixels(2, 3, 64, 64))
    model.eval()(pixels(2, 3, 64, 64))
    before, after = (maps.flatten(2) for maps in seen[0])
    alive = (before > 0).any(-1)
    dropped = alive & ~(after > 0).any(-1)
    assert 0.4 < dropped.float().sum() / alive.sum() < 0.6
    kept = alive & ~dropped
    torch.testing.assert_close(after[kept], before[kept] * 2)
    assert torch.equal(*seen[1])


def test_a_width_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"width_multiplier must be at least 1/64.*got 0\.001"):
        ResNet38(width_multiplier=0.001)
