"""A method that only samples, for tests of launchers: what they start compiles little and trains nothing."""

import dataclasses

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, keep
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Response
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.toyworld import world
from jaxsi.toyworld.seed import SHIPPED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = str(SHIPPED)
    sampling: SamplingConfig = SamplingConfig(num_samples=1, max_new_tokens=16, batch_size=16, dtype="float32")
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def sampling(cfg: Config, run: Run) -> LM:
    it = run.at("iter_0")
    model = keep(begin(cfg, run), it)
    prompts = world.prompts(16, seed=1, held_out=False)
    it.sharded("responses", prompts, sample, model, cfg.sampling, it.key("responses"), of=Response, by=model)
    return model


def config() -> Config:
    return Config()
