"""What every network beside Bi-Trans has to do, as tests to be inherited.

A test class of a network derives from `HubModelContract` and gives `make`; what differs is told by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import pixels
from transformers import PreTrainedModel

SIZES = ((64, 64), (37, 52), (9, 70))


class HubModelContract:
    """Tests of one network in several variants.

    Attributes:
        auto: The Auto class that loads it.
        outputs: Fields of the output that are compared.
        variants: What `make` is called with, by name.
    """

    auto: ClassVar[Any]
    outputs: ClassVar[tuple[str, ...]]
    make: Callable[..., PreTrainedModel]
    labels: Callable[..., torch.Tensor]

    def maps(self, model: PreTrainedModel, images: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            output = model.eval()(images)
        return [output[name] for name in self.outputs if output.get(name) is not None]

    def test_saved_and_loaded_it_is_the_same_network(self, variant: dict[str, Any], tmp_path: Path):
        model, images = self.make(**variant), pixels(1, 3, 37, 52)
        expected = self.maps(model, images)
        model.save_pretrained(tmp_path)
        loaded = self.auto.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert all(map(torch.equal, self.maps(loaded, images), expected))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen
        assert loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()

    def test_new_layers_start_alike_whether_built_or_loaded_without_them(
        self, variant: dict[str, Any], tmp_path: Path
    ):
        # Loading builds on the meta device: what neither the file nor `_init_weights` fills would be garbage.
        model = self.make(**variant)
        known = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
        model.save_pretrained(tmp_path, state_dict=known)
        loaded = self.auto.from_pretrained(tmp_path).state_dict()
        for name, value in model.state_dict().items():
            if name in known:
                assert torch.equal(loaded[name], value), name
            elif value.numel() > 1000:
                assert loaded[name].std().item() == pytest.approx(value.std().item(), rel=0.15), name
            elif value.ndim == 1 and not name.endswith("bias"):  # scales and statistics
                assert torch.equal(loaded[name], value), name
            else:  # few numbers, drawn within one of zero
                assert loaded[name].isfinite().all(), name
                assert loaded[name].abs().max() < 2, name

    @pytest.mark.parametrize("size", SIZES)
    def test_a_row_of_a_batch_is_what_the_image_alone_gives(self, variant: dict[str, Any], size: tuple[int, int]):
        model, images = self.make(**variant), pixels(3, 3, *size)
        together = self.maps(model, images)
        assert together
        for index in range(3):
            for both, alone in zip(together, self.maps(model, images[index : index + 1]), strict=True):
                assert both.isfinite().all()
                torch.testing.assert_close(both[index : index + 1], alone, atol=1e-3, rtol=1e-3)

    def test_what_is_trained_gets_a_gradient_and_what_is_frozen_stays(self, variant: dict[str, Any]):
        model, images = self.make(**variant).train(), pixels(2, 3, 96, 96)
        groups = model.parameter_groups()
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert sorted(grouped) == sorted(map(id, trained.values()))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(groups, lr=0.01)
        model(images, labels=self.labels(model, images)).loss.backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        frozen_norms = getattr(model.config, "freeze_batch_norm", False) or model.config.num_frozen_stages == -1
        for name, value in model.state_dict().items():
            is_statistic = "running_" in name or "num_batches" in name
            if name in trained or (is_statistic and not (frozen_norms and name.startswith("backbone."))):
                continue
            assert torch.equal(value, before[name]), name

    def test_it_runs_in_bfloat16(self, variant: dict[str, Any]):
        model, images = self.make(**variant), pixels(1, 3, 64, 64)
        full = self.maps(model, images)
        half = self.maps(model.to(torch.bfloat16), images.to(torch.bfloat16))
        for ours, theirs in zip(half, full, strict=True):
            assert ours.isfinite().all()
            assert (ours.float() - theirs).abs().mean() < 0.1 * theirs.abs().mean() + 0.02

    def test_return_dict_false_gives_a_plain_tuple(self, variant: dict[str, Any]):
        model, images = self.make(**variant), pixels(1, 3, 64, 64)
        with torch.no_grad():
            plain = model.eval()(images, return_dict=False)
            assert isinstance(plain, tuple)
            assert torch.equal(plain[0], model(images)[0])

    @pytest.mark.slow
    def test_it_compiles_to_one_graph_with_its_loss(self, variant: dict[str, Any]):
        model, images = self.make(**variant), pixels(1, 3, 64, 64)
        labels = self.labels(model, images)[:1]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(images, labels=labels).loss, model(images, labels=labels).loss)
