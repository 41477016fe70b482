"""python train.py precision=fp8 model=gpt-small"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mptrain import build, config, sweep
from mptrain.cli.errors import clear_errors
from mptrain.distributed.joining import left_cleanly
from mptrain.precision.policy import conf_dir
from mptrain.runs import resumption


@hydra.main(version_base=None, config_path=str(conf_dir()), config_name="config")
def main(composed: DictConfig) -> float | None:
    if sweep.is_job():
        return sweep.job(composed)
    with clear_errors():  # here for the run, below for the command line
        sweep.require_single(composed)
        run = build.build(resumption.settings(composed, list(HydraConfig.get().overrides.task)))
        if run is None:  # it is finished, as was said
            return None
        run.train()
    if run.trainer.interrupts.stopped_by is not None:
        sys.exit(128 + run.trainer.interrupts.stopped_by)
    return None


if __name__ == "__main__":
    config.register()
    sys.argv[1:] = config.readable(sys.argv[1:])
    with left_cleanly(), clear_errors(), sweep.reported():
        main()
