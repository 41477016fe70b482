"""python train.py precision=fp8 model=gpt-small"""

import sys

import hydra
from omegaconf import DictConfig

from mptrain import build, config
from mptrain.policy import conf_dir


@hydra.main(version_base=None, config_path=str(conf_dir()), config_name="config")
def main(composed: DictConfig) -> None:
    with config.clear_errors():  # here for the run, below for the command line
        run = build.build(config.parse(composed))
        run.train()
    if run.trainer.interrupts.stopped_by is not None:
        sys.exit(128 + run.trainer.interrupts.stopped_by)


if __name__ == "__main__":
    config.register()
    with config.clear_errors():
        main()
