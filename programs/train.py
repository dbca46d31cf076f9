"""Trains a small Llama on this Python's own source code, data-parallel over processes, and lets it write some more.

    python -m danaus.programs.train
    python -m danaus.programs.train --ranks 2 --steps 500 --text 'books/**/*.txt' --bpe-vocab 2048
    python -m danaus.programs.train --kill-rank-at 120
    python -m danaus.programs.train --chaos 20 --steps 100 --model tiny
    python -m danaus.programs.train --hosts 2 --kill-host-at 120
    python -m danaus.programs.train --out out/mine --resume

Four ranks of one thread each take about a minute on two cores; the loss falls from 5.2 to about 1.8 nats per byte, and
the sample at the end looks like Python from a distance. Checkpoints, loss, its plot and the sample are in ``--out``.

With ``--kill-rank-at`` a rank is killed in the middle of that step. The runtime starts it again, it takes the state of
another rank, and the run goes on from the step before; nothing happens to the other ranks. Losses and final state are
those of a run in which nothing happened. ``--chaos 20`` does so at random, and compares.

With ``--hosts 2`` the ranks are spread over two hosts, which are daemons on this machine; on a cluster, another job
takes the place of the ``LocalJob`` and nothing else changes. ``--kill-host-at`` ends one of them, its daemon and all of
its ranks, in the middle of that step. The job starts another, the runtime the ranks on it, and the run goes on.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from danaus import Restart, SupervisionError, this_host
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
    newest_step,
    read_documents,
)
from danaus.actors.models import base, small, tiny
from danaus.programs.arguments import parse_config
from danaus.programs.chaos import Loss, Saboteur, draw_losses
from danaus.programs.progress import TrainingBar
from danaus.programs.run_log import RunLog
from danaus.runtime.jobs.local_job import LocalJob

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from danaus import HostMesh

P = ParamSpec("P")
R = TypeVar("R")
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
    kernels: Literal["torch", "reference", "triton"] = "torch"
    """Who computes the model's parts: torch, or danaus.kernels by its references or, on GPUs, by Triton."""
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
    hosts: int = 1
    """Hosts that share the ranks: more than one are daemons on this machine."""
    kill_host_at: int | None = None
    """End the last host in the middle of this step, with all of its ranks; another one takes its place."""
    chaos: int = 0
    """Kill this many random ranks at random points, and compare the result with that of an undisturbed run."""
    chaos_seed: int = 0
    """Determines who is killed, and where."""
    max_restarts: int = 3
    """Restarts of lost ranks within a minute after which the run is given up."""
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
        if self.hosts < 1 or self.ranks % self.hosts:
            raise ValueError(f"--ranks {self.ranks} cannot be shared equally by --hosts {self.hosts}")
        if self.kill_host_at is not None and self.hosts == 1:
            raise ValueError("--kill-host-at needs --hosts 2 or more: the only host is that of the program itself")
        if self.kill_host_at is not None and self.kill_host_at == self.kill_rank_at:
            raise ValueError("--kill-rank-at and --kill-host-at: in a step of their own each")
        if self.chaos and self.resume:
            raise ValueError("--chaos compares two whole runs: leave out --resume")
        if self.chaos >= self.steps:
            raise ValueError(
                f"--chaos {self.chaos} needs more than {self.chaos} steps, one for each loss after the first"
            )


def main(config: Config) -> RunLog:
    """Train as ``config`` says, through lost ranks, and return what became of it."""
    corpus = read_corpus(config)
    if not config.chaos:
        log = run(config, corpus, run_folder(config), planned_losses(config))
        print(f"{log.summary()}\n\n{log.sample}")
        return log
    out = run_folder(config)
    print("first a run in which nothing happens, to compare with")
    undisturbed = run(config, corpus, out / "undisturbed")
    log = run(config, corpus, out, planned_losses(config))
    print(f"{log.summary()}\nthe run in which nothing happened:       state {undisturbed.state_hash[:16]}")
    if (log.state_hash, log.losses) != (undisturbed.state_hash, undisturbed.losses):
        raise RuntimeError(f"the runs differ: states {log.state_hash} and {undisturbed.state_hash}")
    return log


def run(config: Config, corpus: Corpus, out: Path, losses: Sequence[Loss] = ()) -> RunLog:
    """Train from the newest checkpoint in ``out``, or from the beginning, to the last step, through ``losses``."""
    out.mkdir(parents=True, exist_ok=True)
    log = RunLog.read(out, up_to=newest_step(out))
    saboteur = Saboteur(losses)
    per_host = config.ranks // config.hosts
    # The loss of a host is that of each of its ranks.
    num_planned = config.chaos + (0 if config.kill_host_at is None else per_host)
    restart = Restart(max_restarts=config.max_restarts + num_planned)
    with (
        TrainingBar(config.steps) as bar,
        training_hosts(config) as hosts,
        hosts.spawn_procs({"dp": per_host}, name="trainers", preload=Trainer.PRELOAD, restart=restart) as procs,
    ):
        bar.say(f"files of this run go to {out}")
        trainers = procs.spawn(
            "trainers", Trainer, train_config(config, corpus), corpus, checkpoints=str(out), exact=not config.resume
        )
        train(trainers, config, log, bar, saboteur)
        if len(losses) > 1:
            bar.say(saboteur.table())
    return log


@contextmanager
def training_hosts(config: Config) -> Generator[HostMesh]:
    """Give the hosts to train on: this one, or several that are started here, whose lost ones are replaced."""
    if config.hosts == 1:
        yield this_host()
        return
    with LocalJob(hosts=config.hosts, name=f"train-{os.getpid()}", replace_lost=config.hosts) as job:
        yield job.hosts()


def train(trainers: Trainer, config: Config, log: RunLog, bar: TrainingBar, saboteur: Saboteur) -> None:
    """Train to the last step, whoever is lost on the way."""
    done = going_on(log, bar, begin, trainers, config, bar)
    while done < config.steps:
        if planned := saboteur.prepare(trainers, done + 1):
            bar.say(f"about to kill {planned}")
        done = going_on(log, bar, train_step, trainers, done + 1, config, log, bar)
        if done % config.save_every == 0 or done == config.steps:
            going_on(log, bar, keep, trainers, done, config, log, bar)
    going_on(log, bar, finish, trainers, config, log)
    saboteur.stop()


def going_on(log: RunLog, bar: TrainingBar, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call ``act``; where a rank that it needs is lost, call it again, with the same trainers, once it is back."""
    while True:
        try:
            return act(*args, **kwargs)
        except SupervisionError as error:
            if not error.failure.restarts:
                raise
            if log.on_rank_lost(error.failure):
                bar.say(f"rank {error.failure.rank} is lost: going on with the same trainers, once it is started again")


def begin(trainers: Trainer, config: Config, bar: TrainingBar) -> int:
    """Say who trains; return the number of steps that are completed already."""
    ranks = list(trainers.describe.options(timeout=config.timeout_s).call().get())
    done = trainers.sync.options(timeout=config.timeout_s).call().get().get(0)
    bar.say(
        f"{len(ranks)} ranks on {ranks[0].device}, each {ranks[0].num_threads} thread(s), pids {[r.pid for r in ranks]}"
    )
    bar.say(f"each has the model of {ranks[0].num_parameters:,} weights and a part of every batch")
    if done:
        bar.say(f"going on after step {done}")
    return done


def train_step(trainers: Trainer, step: int, config: Config, log: RunLog, bar: TrainingBar) -> int:
    """Complete ``step`` and return it."""
    metrics = list(trainers.step.options(timeout=config.timeout_s).call(step).get())
    log.on_step(metrics[0], now_s=time.time())
    bar.show(metrics)
    if step in log.recoveries:
        pids = [rank.pid for rank in trainers.describe.options(timeout=config.timeout_s).call().get()]
        bar.say(f"step {step} is completed {log.recoveries[step]:.2f} s after the loss; pids are {pids} now")
    return step


def keep(trainers: Trainer, done: int, config: Config, log: RunLog, bar: TrainingBar) -> None:
    """Evaluate and save what the model is after ``done`` steps."""
    held_out = trainers.evaluate.options(timeout=config.timeout_s).call().get().get(0)
    path = trainers.save.options(timeout=config.timeout_s).call().get().get(0)
    log.held_out[done] = held_out
    log.write()
    bar.say(f"step {done}: held-out loss {held_out:.3f}, checkpoint {Path(path).name}")


def finish(trainers: Trainer, config: Config, log: RunLog) -> None:
    """Let the model write, draw the loss, compare the replicas."""
    first = trainers.flatten("rank").slice(rank=0)
    sample = first.sample.options(timeout=config.timeout_s)
    log.sample = sample.call_one(config.prompt, max_tokens=config.sample_tokens, seed=config.seed).get()
    (log.out / "sample.txt").write_text(log.sample)
    log.plot()
    hashes = set(trainers.state_hash.options(timeout=config.timeout_s).call().get())
    if len(hashes) > 1:
        raise RuntimeError(f"the replicas differ: {sorted(hashes)}")
    (log.state_hash,) = hashes


def planned_losses(config: Config) -> list[Loss]:
    """Return the ranks that are to be killed."""
    losses = draw_losses(
        config.chaos_seed, config.chaos, ranks=config.ranks, steps=config.steps, save_every=config.save_every
    )
    if config.kill_rank_at is not None:
        losses.append(Loss(config.ranks - 1, "backward", config.kill_rank_at))
    if config.kill_host_at is not None:
        losses.append(Loss(config.ranks - 1, "backward", config.kill_host_at, with_host=True))
    return losses


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
    model = MODELS[config.model](vocab_size=corpus.tokenizer.vocab_size, max_seq_len=max_seq_len)
    return TrainConfig(
        model=replace(model, kernels=config.kernels),
        optimizer=OptimizerConfig(peak_lr=config.peak_lr, warmup_steps=min(10, config.steps), total_steps=config.steps),
        seed=config.seed,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
    )


def run_folder(config: Config) -> Path:
    """Return the absolute folder of the run's files; refuse one that holds another run."""
    out = Path(config.out or time.strftime("out/train-%Y%m%d-%H%M%S")).absolute()
    if newest_checkpoint(out) and not config.resume:
        raise FileExistsError(f"{out} holds checkpoints: add --resume to go on from them, or choose another --out")
    return out


if __name__ == "__main__":
    main(parse_config(Config, about=(__doc__ or "").split("\n", 1)[0]))
