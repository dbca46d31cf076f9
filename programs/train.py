"""Trains a small Llama on this Python's own source code, data-parallel over processes, and lets it write some more.

    python -m danaus.programs.train
    python -m danaus.programs.train --ranks 2 --steps 500 --text 'books/**/*.txt' --bpe-vocab 2048
    python -m danaus.programs.train --kill-rank-at 120
    python -m danaus.programs.train --out out/mine --resume

Four ranks of one thread each take about a minute on two cores; the loss falls from 5.2 to about 1.8 nats per byte, and
the sample at the end looks like Python from a distance. Checkpoints, loss, its plot and the sample are in ``--out``.

With ``--kill-rank-at`` a rank is killed in the middle of that step. The script sees it, starts new ranks from the
newest checkpoint and goes on; the losses are those of a run in which nothing happened.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danaus import ActorError, SupervisionError, this_host
from danaus.actors import (
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    OptimizerConfig,
    TrainConfig,
    Trainer,
    find_texts,
    make_corpus,
    newest_checkpoint,
    read_documents,
    read_manifest,
)
from danaus.actors.models import base, small, tiny
from danaus.programs.arguments import parse_config
from danaus.programs.progress import TrainingBar
from danaus.programs.run_log import RunLog

MODELS = {"tiny": tiny, "small": small, "base": base}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run of this program."""

    ranks: int = 4
    """Processes that share each batch."""
    steps: int = 200
    """Optimizer steps."""
    text: tuple[str, ...] = ()
    """Patterns of the files to learn from, such as 'notes/**/*.md'; none takes Python's standard library."""
    max_text_mib: float = 8.0
    """Most text to read."""
    bpe_vocab: int | None = None
    """Learn a byte-pair encoding of this many tokens from the text, instead of using bytes."""
    model: Literal["tiny", "small", "base"] = "small"
    """Size of the model."""
    seq_len: int = 128
    """Tokens per sequence."""
    batch_size: int = 32
    """Sequences per step over all ranks."""
    micro_batch_size: int = 8
    """Sequences per forward and backward pass of a rank."""
    peak_lr: float = 3e-3
    """Learning rate after the warm-up."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products."""
    seed: int = 0
    """Of weights, data order and sample."""
    out: str | None = None
    """Folder for checkpoints, plot and sample; by default a new one under out/."""
    save_every: int = 50
    """Steps between checkpoints, which are also evaluated."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    kill_rank_at: int | None = None
    """Kill the last rank in the middle of this step, to see the run survive it."""
    max_recoveries: int = 3
    """Lost ranks after which the run is given up."""
    timeout_s: float = 600.0
    """Longest that a single step, evaluation or checkpoint may take."""
    prompt: str = "import os\n\n\ndef "
    """What the sample starts with."""
    sample_tokens: int = 200
    """Length of the sample."""

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out: the folder of the run to go on with")
        if min(self.ranks, self.steps, self.save_every) < 1:
            raise ValueError("--ranks, --steps and --save-every must be 1 or more")


def main(config: Config) -> RunLog:
    """Train as ``config`` says, through lost ranks, and return what became of it."""
    out = run_folder(config)
    corpus = read_corpus(config)
    plan = train_config(config, corpus)
    log = RunLog.read(out, up_to=newest_step(out))
    with TrainingBar(config.steps) as bar:
        bar.say(f"files of this run go to {out}")
        for recoveries_left in range(config.max_recoveries, -1, -1):
            with this_host().spawn_procs({"dp": config.ranks}, name="trainers", preload=Trainer.PRELOAD) as procs:
                trainers = procs.spawn("trainers", Trainer, plan, corpus)
                try:
                    train(trainers, config, log, bar)
                    break
                except (SupervisionError, ActorError) as error:
                    loss = find_loss(trainers, error)
                    if loss is None or not recoveries_left:
                        raise
                    log.on_rank_lost()
                    bar.say(f"a rank is lost: {loss}\nstarting new ranks from the newest checkpoint")
    print(f"{log.summary()}\n\n{log.sample}")
    return log


def train(trainers: Trainer, config: Config, log: RunLog, bar: TrainingBar) -> None:
    """Train on one set of ranks, from the newest checkpoint to the last step."""
    first, limit_s = trainers.slice(dp=0), config.timeout_s
    ranks = list(trainers.describe.options(timeout=limit_s).call().get())
    bar.say(
        f"{len(ranks)} ranks on {ranks[0].device}, each {ranks[0].num_threads} thread(s), pids {[r.pid for r in ranks]}"
    )
    bar.say(f"each has the model of {ranks[0].num_parameters:,} weights and a part of every batch")
    done = first.resume.options(timeout=limit_s).call_one(str(log.out), exact=not config.resume).get()
    if done:
        trainers.replicate.options(timeout=limit_s).call(0).get()
        bar.say(f"going on after step {done}")
    while done < config.steps:
        step = trainers.step.options(timeout=limit_s).call()
        if done + 1 == config.kill_rank_at and config.kill_rank_at not in log.losses and not log.is_recovering:
            os.kill(ranks[-1].pid, signal.SIGKILL)
            bar.say(f"killed rank {ranks[-1].rank} in step {done + 1}")
        metrics = list(step.get())
        done = metrics[0].step
        log.on_step(metrics[0])
        bar.show(metrics)
        if done % config.save_every == 0 or done == config.steps:
            log.held_out[done] = trainers.evaluate.options(timeout=limit_s).call().get().get(0)
            log.write()
            path = first.save.options(timeout=limit_s).call_one(str(log.out)).get()
            bar.say(f"step {done}: held-out loss {log.held_out[done]:.3f}, checkpoint {Path(path).name}")
    finish(trainers, config, log)


def finish(trainers: Trainer, config: Config, log: RunLog) -> None:
    """Compare the replicas, let the model write, draw the loss."""
    hashes = set(trainers.state_hash.options(timeout=config.timeout_s).call().get())
    if len(hashes) > 1:
        raise RuntimeError(f"the replicas differ: {sorted(hashes)}")
    (log.state_hash,) = hashes
    sample = trainers.slice(dp=0).sample.options(timeout=config.timeout_s)
    log.sample = sample.call_one(config.prompt, max_tokens=config.sample_tokens, seed=config.seed).get()
    (log.out / "sample.txt").write_text(log.sample)
    log.plot()


def find_loss(trainers: Trainer, error: Exception) -> SupervisionError | None:
    """Return what tells of a dead rank; when one dies in a collective, a peer may complain about it first."""
    if isinstance(error, SupervisionError):
        return error
    asked = trainers.describe.options(timeout=5.0).call().exception()
    return asked if isinstance(asked, SupervisionError) else None


def read_corpus(config: Config) -> Corpus:
    """Read the text and turn it into tokens."""
    files = find_texts(config.text)
    documents = read_documents(files, max_bytes=int(config.max_text_mib * 2**20))
    print(f"read {sum(map(len, documents)):,} characters from {len(documents)} of {len(files)} files")
    tokenizer = (
        ByteTokenizer() if config.bpe_vocab is None else BpeTokenizer.train(documents, vocab_size=config.bpe_vocab)
    )
    corpus = make_corpus(documents, tokenizer)
    sizes = f"{len(corpus.train_tokens):,} tokens to train on, {len(corpus.val_tokens):,} held out"
    print(f"{sizes}, of a vocabulary of {tokenizer.vocab_size}")
    return corpus


def train_config(config: Config, corpus: Corpus) -> TrainConfig:
    """Return what the trainers need to know."""
    max_seq_len = max(config.seq_len, len(corpus.tokenizer.encode(config.prompt)) + config.sample_tokens)
    return TrainConfig(
        model=MODELS[config.model](vocab_size=corpus.tokenizer.vocab_size, max_seq_len=max_seq_len),
        optimizer=OptimizerConfig(peak_lr=config.peak_lr, warmup_steps=min(10, config.steps), total_steps=config.steps),
        seed=config.seed,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
    )


def newest_step(out: Path) -> int:
    """Return the step of the newest checkpoint in ``out``, 0 where there is none."""
    newest = newest_checkpoint(out)
    return 0 if newest is None else read_manifest(newest).step


def run_folder(config: Config) -> Path:
    """Return the absolute folder of the run's files; refuse one that holds another run."""
    out = Path(config.out or time.strftime("out/train-%Y%m%d-%H%M%S")).absolute()
    if newest_checkpoint(out) and not config.resume:
        raise FileExistsError(f"{out} holds checkpoints: add --resume to go on from them, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


if __name__ == "__main__":
    main(parse_config(Config, about=(__doc__ or "").split("\n", 1)[0]))
