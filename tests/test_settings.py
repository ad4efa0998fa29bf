"""Numbers that no run can use are refused where they are given."""

import pytest

from jaxsi.methods.self_rewarding import PairConfig
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig, LocalCritic
from jaxsi.stages.reviser_data import LabelConfig
from jaxsi.stages.self_instruct import SelfInstruct
from jaxsi.training import losses
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import DPOConfig

NAN = float("nan")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DPOConfig, {"beta": NAN}), (DPOConfig, {"beta": 0.0}), (DPOConfig, {"nll_coef": NAN}),
        (RLConfig, {"kl_coef": NAN}), (RLConfig, {"cut_off_penalty": NAN}), (RLConfig, {"clip": NAN}),
        (SamplingConfig, {"temperature": NAN}), (SamplingConfig, {"batch_size": 0}),
        (CritiqueConfig, {"temperature": NAN}), (CritiqueConfig, {"max_new_tokens": 0}),
        (CritiqueConfig, {"batch_size": 0}), (LocalCritic, {"batch_size": 0}), (LocalCritic, {"temperature": -1.0}),
        (SelfInstruct, {"temperature": NAN}), (SelfInstruct, {"top_p": 0.0}), (SelfInstruct, {"batch_size": 0}),
        (LabelConfig, {"mix": (NAN, 1.0, 1.0)}), (PairConfig, {"min_gap": NAN}), (PairConfig, {"length_control": NAN}),
        (losses.simpo, {"gamma": NAN}), (losses.dpo_smoothed, {"label_smoothing": 0.5}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)  # fmt: skip
def test_number_out_of_range_is_refused_by_the_config(cls, settings):
    """NaN, zero and negative ones: a run with them would end without a word, and its model would be useless."""
    needed = {RLConfig: {"optim": OptimConfig(learning_rate=1e-3), "steps": 1}, LocalCritic: {"model": "x"}}
    needed[SelfInstruct] = {"num_prompts": 1}
    valid = needed.get(cls, {})
    cls(**valid)
    with pytest.raises(ValueError, match=next(iter(settings))):
        cls(**valid, **settings)
