"""Pretrain a GPT-2 with a harmonic or a softmax head.

    python train.py --config configs/quickstart.toml [--section.key value ...]
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train.py --config configs/gpt2_small_harmonic.toml

Read it once, downwards. `--help` lists every setting.

Exit codes: 0 finished; 2 bad input, or a fault that the message tells how to mend; 70 the processes hung or lost each
other; 75 stopped by SIGTERM or SIGUSR1 after a checkpoint, to be started again; 130 interrupted.
"""

import copy
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from hgpt.data.baselines import unigram_loss
from hgpt.data.batches import DeviceBatches, TrainingBatches
from hgpt.data.shards import TokenShards, verify
from hgpt.data.tokenizer import hf_tokenizer
from hgpt.durable import folder_lock
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run import checkpoint as ckpt
from hgpt.run.config import RunConfig
from hgpt.run.energy import RunEnergy, check_country, in_words, last_record
from hgpt.run.engines import (
    FullState,
    build_accelerator,
    check_same_everywhere,
    collect_state,
    configure_engine,
    engine_name,
    model_weights,
    restore_state,
)
from hgpt.run.evaluation import evaluation_windows, head_diagnostics, validation_loss
from hgpt.run.model_card import model_card
from hgpt.run.optim import build_optimizer, learning_rate, set_learning_rate
from hgpt.run.report import (
    METRICS_FILE,
    LossSpikes,
    MetricsLog,
    PhaseTimes,
    Throughput,
    build_trackers,
    device_name,
    flops_per_token,
    memory_in_use,
    peak_flops,
)
from hgpt.run.settings import CONFIG_FILE, check_resume, load_run_config, settings, write_toml
from hgpt.run.stop import EXIT_HUNG, Watchdog
from hgpt.source import initialize_from

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
NON_FINITE_FILE = "non_finite.jsonl"


class Preempted(Exception):
    """A cluster asked for the machine (SIGTERM, SIGUSR1), and a checkpoint was saved."""


def main(config: RunConfig) -> dict[str, float]:
    """Train as `config` says; returns the last evaluation (`loss`, and the diagnostics of the head)."""
    with ExitStack() as held:
        return _train(config, held)


def _train(config: RunConfig, held: ExitStack) -> dict[str, float]:
    """`held` is given up however the run ends."""
    # ------------------------------------------------------------------------------------------------------------
    # Data. Opened first: most mistakes are here, and they should cost no time.
    if config.log.energy_country is not None:
        check_country(config.log.energy_country)
    train_shards = TokenShards.open(config.data.path, "train", config.data.vocab_size)
    val_shards = TokenShards.open(config.data.path, "val", config.data.vocab_size)
    evaluation_windows(val_shards, config.data.seq_len)  # raises if there is not one sequence to evaluate
    model_config = config.model.to_hf(
        vocab_size=train_shards.vocab_size, seq_len=config.data.seq_len, end_of_text=train_shards.end_of_text
    )

    # ------------------------------------------------------------------------------------------------------------
    # Processes and precision.
    accelerator = build_accelerator(config.train.precision, config.train.hang_timeout)
    check_same_everywhere(accelerator, settings(config) | ckpt.package_versions())
    batches = TrainingBatches(
        train_shards,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
        seed=config.train.seed,
    )
    device_batches = DeviceBatches(batches, accelerator.device)
    accelerator.gradient_accumulation_steps = batches.accumulation
    configure_engine(
        accelerator,
        micro_batch=config.train.micro_batch,
        accumulation=batches.accumulation,
        grad_clip=config.optim.grad_clip,
        compiled=config.train.compile,
        skips=config.train.skip_non_finite,
        muon=config.optim.algorithm == "muon",
    )
    if config.data.verify and accelerator.is_main_process:
        verify(config.data.path, config.data.vocab_size)
    tokens_per_step = config.train.global_batch * config.data.seq_len
    say = accelerator.print

    # ------------------------------------------------------------------------------------------------------------
    # The run folder: new, or to go on in.
    run_folder = config.run_folder
    resume_from = _checkpoint_to_resume(config, say)
    data_id = ckpt.data_fingerprint(train_shards, val_shards)
    step, validation, validation_step = 0, None, None
    if resume_from is not None:
        saved = ckpt.load_state(resume_from)
        differences = check_resume(saved.settings, config, resume_from)
        if saved.data != data_id:
            raise UserError(
                f"cannot go on from {resume_from}: the data in {config.data.path} is not the data it was trained on "
                "(the checksums of the shards differ). Point data.path at that data, or give the run another name."
            )
        step, validation, validation_step = saved.step, saved.validation_loss, saved.validation_step
        say(f"resuming from {resume_from}" + "".join(f"\n  {line}" for line in differences))

    # ------------------------------------------------------------------------------------------------------------
    # Model and optimiser. Every process draws the same initial weights; dropout then differs between them.
    set_seed(config.train.seed)
    states = None
    if resume_from is not None:
        model = ckpt.load_model(resume_from)
        states = ckpt.load_optimizer(resume_from, model)
    else:
        model = HGPTForCausalLM(model_config)
        if config.model.init_from is not None:
            for note in initialize_from(model, config.model.init_from):
                say(f"{config.model.init_from}: {note}")
    model.lm_head.label_smoothing = config.train.label_smoothing  # in training mode only, and not exported
    model.lm_head.compiled = config.train.compile_loss
    set_seed(config.train.seed, device_specific=True)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        for block in model.transformer.h:  # in place: parameters keep their names
            # Blocks share one compilation, unless each has a constant of its own.
            block.compile(isolate_recompiles=config.model.scale_attn_by_inverse_layer_idx)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, config.optim)
    if (
        resume_from is not None
        and not ckpt.load_random_state(resume_from, accelerator.process_index)
        and config.model.dropout > 0
    ):
        say("the checkpoint has no random state for this process: dropout goes on with other random numbers")
    plain_model, plain_optimizer = model, optimizer
    hf_config, parameters = copy.deepcopy(model.config), model.num_parameters()  # ZeRO-3 leaves empty parameters
    exact = model_weights(model, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    restore_state(plain_model, optimizer, accelerator, exact, states)
    del exact, states
    model.train()

    # ------------------------------------------------------------------------------------------------------------
    # Reporting. The run folder is made when nothing in the input can be wrong any more, and when no process still looks
    # whether it exists.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training in {run_folder}: wait for it, or end it, or choose another --name"
            held.enter_context(folder_lock(run_folder / ckpt.LOCK, busy))
            write_toml(config, run_folder / CONFIG_FILE)
            (run_folder / ckpt.PREEMPTED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"the run folder {run_folder} cannot be written: {error}; choose another --runs_dir"
            ) from error
        if resume_from is not None and resume_from.parent == run_folder / ckpt.CHECKPOINTS:
            ckpt.point_latest(run_folder, resume_from)  # a crash may have come between a checkpoint and its link
    device = device_name(accelerator.device)
    peak = peak_flops(device) if accelerator.mixed_precision == "bf16" else None
    flops = flops_per_token(model_config, config.data.seq_len)
    unigram = unigram_loss(train_shards, val_shards) if config.eval.unigram_baseline else None
    log = None
    if accelerator.is_main_process:
        trackers = build_trackers(config.log, run_folder, config.name, step)
        log = MetricsLog(run_folder, trackers, settings(config), step)
    for line in _introduction(
        config, hf_config, parameters, train_shards, val_shards, accelerator, device, batches.accumulation
    ):
        say(line)
    if unigram is not None:
        say(f"a unigram model of this data has validation loss {unigram:.4f}")

    def save(step: int, writer: ckpt.Writer) -> Path:
        """Collect what a checkpoint holds, which needs every process, and let the main process write it."""
        target = run_folder / ckpt.CHECKPOINTS / f"step_{step:07d}"
        writer.wait()
        full = collect_state(plain_model, optimizer, accelerator)
        random_states = gather_object([ckpt.random_state()])
        if full is not None:
            state = ckpt.TrainState(
                step=step,
                tokens=step * tokens_per_step,
                validation_loss=validation,
                validation_step=validation_step,
                settings=settings(config),
                data=data_id,
                world_size=accelerator.num_processes,
            )
            writer.submit(
                lambda: _write_checkpoint(target, full, random_states, state, config, hf_config, train_shards)
            )
        return target

    # ------------------------------------------------------------------------------------------------------------
    # The loop runs steps + 1 times: the last pass only evaluates and saves.
    first_step, last_evaluation, spent = step, {}, None
    energy = None
    if config.log.energy_country is not None:
        before = None if resume_from is None else last_record(resume_from.parent.parent / METRICS_FILE, step)
        energy = RunEnergy(
            country=config.log.energy_country,
            measures=accelerator.is_local_main_process,
            gather=gather_object,
            say=say,
            tokens=step * tokens_per_step,
            before=before,
        )
    throughput, phases, spikes = Throughput(), PhaseTimes(accelerator.device), LossSpikes()
    pending: list[torch.Tensor] = []  # (loss, gradient norm) of the steps since the last log, still on the device
    skipped = 0  # steps whose gradient was not finite
    stop = 0  # the signal that came, when all processes know of it
    # disable=None: no bar where standard error is not a terminal; lines are printed there instead.
    hide = None if accelerator.is_main_process else True
    bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=hide, dynamic_ncols=True, smoothing=0.05)
    with (
        _interruptible(config.checkpoint.on_interrupt) as interrupted,
        ckpt.Writer(config.checkpoint.background) as writer,
        Watchdog(config.train.hang_timeout) as watchdog,
        nullcontext() if energy is None else energy,
        bar,
    ):
        if energy is not None and log is not None:
            bar.write(f"energy: {energy.method}")
        while True:
            last = step == config.train.steps
            pause = time.perf_counter()
            evaluating = last or step % config.eval.every == 0
            if evaluating:
                watchdog.beat(step, "evaluation")
                validation_step = step
                with phases("evaluation"):
                    validation = validation_loss(
                        model,
                        val_shards,
                        seq_len=config.data.seq_len,
                        micro_batch=config.eval.micro_batch,
                        accelerator=accelerator,
                    )
                    last_evaluation = {"loss": validation} | head_diagnostics(
                        model,
                        val_shards,
                        seq_len=config.data.seq_len,
                        windows=config.eval.diagnostic_windows,
                        accelerator=accelerator,
                    )
                if not math.isfinite(validation):
                    writer.wait()  # so that the message names the checkpoint that is on its way
                    raise _not_finite(f"the validation loss after step {step} is {validation}", run_folder)
                if log is not None:
                    log.write("eval", step, last_evaluation)
                    bar.write(_evaluation_line(step, last_evaluation))
            new = step > first_step or resume_from is None
            saving = (step > first_step and (last or stop)) or (new and config.checkpoint.due(step))
            # A run that is resumed goes on counting from the line of its checkpoint.
            if energy is not None and new and (evaluating or saving):
                spent = energy.read(step * tokens_per_step)
                if log is not None and spent is not None:
                    log.write("energy", step, spent, method=energy.method)
            if saving:
                watchdog.beat(step, "saving a checkpoint")
                with phases("save"):
                    target = save(step, writer)
                if stop and not last:
                    writer.wait()
                    message = f"after step {step}, saved {target}; go on with --resume auto"
                    if stop == signal.SIGINT:
                        raise KeyboardInterrupt(f"interrupted {message}")
                    if accelerator.is_main_process:
                        (run_folder / ckpt.PREEMPTED).touch()
                    raise Preempted(f"stopped by {signal.Signals(stop).name} {message}")
            throughput.pause(time.perf_counter() - pause)
            if last:
                break

            # One optimiser step. The learning rate is set before the backward pass, in which some engines step.
            watchdog.beat(step, "training")
            lr = learning_rate(step, config.train.steps, config.optim)
            set_learning_rate(plain_optimizer, lr)
            step_loss = torch.zeros((), device=accelerator.device)
            for micro_step in range(batches.accumulation):
                with phases("data"):
                    inputs, targets = device_batches(step, micro_step)
                with accelerator.accumulate(model):
                    with phases("forward"):
                        loss = model(inputs, shift_labels=targets, use_cache=False).loss
                    with phases("backward"):
                        accelerator.backward(loss)  # divides by the number of micro-batches
                    step_loss += loss.detach() / batches.accumulation
                    with phases("step"):
                        if accelerator.sync_gradients:
                            limit = config.optim.grad_clip or float("inf")
                            grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), limit))
                            grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
                            if config.train.skip_non_finite:
                                # The fused AdamW looks at it on the device: nobody waits, but for Muon, which cannot.
                                plain_optimizer.found_inf = (~grad_norm.isfinite()).float()
                        optimizer.step()
                        optimizer.zero_grad()
            pending.append(torch.stack((step_loss, grad_norm.to(step_loss))))
            throughput.add(tokens_per_step)
            step += 1
            bar.update()

            # The device is asked for its losses only now and then, but always before they would be saved or evaluated.
            due = step % config.log.every == 0 or step in (first_step + 1, config.train.steps)
            if accelerator.num_processes == 1:
                stop = interrupted()
            elif due:  # processes see a signal at different moments, and have to stop after the same step
                asked = accelerator.gather(torch.tensor([interrupted()], device=accelerator.device))
                stop = int(asked.max())
            if due or stop or config.checkpoint.due(step) or step % config.eval.every == 0:
                recent = accelerator.reduce(torch.stack(pending), reduction="mean").tolist()  # [[loss, norm], ...]
                pending.clear()
                writer.wait(only_look=True)
                bad = [(step - len(recent) + 1 + i, *pair) for i, pair in enumerate(recent) if not _finite(pair)]
                if bad:
                    skipped += len(bad)
                    if log is not None:
                        _note_non_finite(run_folder / NON_FINITE_FILE, bad, batches)
                    if skipped > config.train.skip_non_finite:
                        writer.wait()
                        at, loss_then, norm_then = bad[0]
                        raise _not_finite(
                            f"step {at} has loss {loss_then} and gradient norm {norm_then} (learning rate {lr:.3g}; "
                            f"{skipped} such steps, train.skip_non_finite = {config.train.skip_non_finite})",
                            run_folder,
                        )
                spiked = sum(spikes.add(pair[0]) for pair in recent if _finite(pair))
                if due:
                    rate, seconds = throughput.read(), phases.read()
                    memory = memory_in_use(accelerator.device)
                    # What a process does alone tells which one the others wait for.
                    own = seconds.get("data", 0.0) + seconds.get("forward", 0.0)
                    mine = torch.tensor([[own, memory]], dtype=torch.float32, device=accelerator.device)
                    per_process = accelerator.gather(mine).tolist()
                if due and log is not None:
                    values = {"loss": recent[-1][0], "lr": lr, "grad_norm": recent[-1][1], "tokens_per_second": rate}
                    if peak is not None:
                        values["mfu"] = rate * flops / (peak * accelerator.num_processes)
                    values["tokens"] = step * tokens_per_step
                    values["tokens_per_second_per_process"] = rate / accelerator.num_processes
                    values |= {f"seconds_{phase}": spent for phase, spent in seconds.items()}
                    values |= {"memory_gib": max(m for _, m in per_process), "spikes": spiked, "skipped": len(bad)}
                    if accelerator.num_processes > 1:
                        values["slowest_process"] = max(range(len(per_process)), key=lambda rank: per_process[rank][0])
                    log.write("train", step, values)
                    if accelerator.num_processes > 1:
                        log.write_processes(
                            step,
                            {
                                "seconds_data_forward": [spent for spent, _ in per_process],
                                "memory_gib": [held for _, held in per_process],
                            },
                        )
                    shown = {"loss": f"{recent[-1][0]:.3f}", "tok/s": f"{rate:,.0f}"}
                    if peak is not None:
                        shown["mfu"] = f"{values['mfu']:.1%}"
                    bar.set_postfix(shown)
                    if bar.disable:
                        left = timedelta(seconds=round((config.train.steps - step) * tokens_per_step / rate))
                        report = "  ".join(f"{name} {value}" for name, value in shown.items())
                        say(f"step {step:>6}/{config.train.steps}  {report}  {left} left")

    # ------------------------------------------------------------------------------------------------------------
    if log is not None:
        log.close()
    say(f"\nvalidation loss {validation:.4f}" + (f", of a unigram model {unigram:.4f}" if unigram is not None else ""))
    if energy is not None and spent is not None:
        say(in_words(spent, energy.method))
    say(f"the model is in {run_folder / ckpt.LATEST / ckpt.MODEL}; python sample.py --checkpoint {run_folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return last_evaluation


def _checkpoint_to_resume(config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` asks for, None to start anew. A run folder is never overwritten."""
    run_folder = config.run_folder
    if config.resume == "never":
        if run_folder.exists() and any(run_folder.iterdir()):
            raise UserError(
                f"{run_folder} exists already and is never overwritten: go on with --resume auto, or choose another "
                "--name"
            )
        return None
    if config.resume == "auto":
        newest = ckpt.newest_checkpoint(run_folder, warn=say)
        if newest is None and ckpt.checkpoints(run_folder):
            raise UserError(f"every checkpoint of {run_folder} is damaged: choose another --name to start anew")
        return newest
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(f'resume = {config.resume!r}: it must be "never", "auto" or the folder of a checkpoint')
    if fault := ckpt.damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {fault}; choose another one, or --resume auto")
    mine = checkpoint.resolve().parent == (run_folder / ckpt.CHECKPOINTS).resolve()
    if not mine and run_folder.exists() and any(run_folder.iterdir()):
        raise UserError(f"{run_folder} exists already and {checkpoint} is not its checkpoint: choose another --name")
    return checkpoint


def _write_checkpoint(
    target: Path,
    full: FullState,
    random_states: list[dict[str, torch.Tensor]],
    state: ckpt.TrainState,
    config: RunConfig,
    hf_config: HGPTConfig,
    shards: TokenShards,
) -> None:
    """A checkpoint folder, complete or not at all, with the Hugging Face model, its tokenizer and its card in it."""
    with ckpt.atomic_folder(target) as folder:
        ckpt.save_training_state(folder, full, random_states, state)
        model = folder / ckpt.MODEL
        ckpt.save_model(model, hf_config, full.weights)
        tokenizer_file = Path(config.data.path) / "tokenizer.json"
        if tokenizer_file.exists():  # a bare nanoGPT folder has none
            hf_tokenizer(tokenizer_file, config.data.seq_len, shards.end_of_text).save_pretrained(model)
        card = model_card(
            hf_config,
            name=config.name,
            weights=full.weights,
            data=config.data.path if shards.meta is None else shards.meta.source,
            tokens=state.tokens,
            steps=state.step,
            validation_loss=state.validation_loss,
            validation_step=state.validation_step,
        )
        (model / "README.md").write_text(card, encoding="utf-8")
        ckpt.write_manifest(folder)
    ckpt.point_latest(config.run_folder, target)
    ckpt.remove_old(config.run_folder, config.checkpoint)


def _introduction(
    config: RunConfig,
    hf_config: HGPTConfig,
    parameters: int,
    train_shards: TokenShards,
    val_shards: TokenShards,
    accelerator: Accelerator,
    device: str,
    accumulation: int,
) -> Iterator[str]:
    """What is about to happen, in three lines."""
    tokens_per_step = config.train.global_batch * config.data.seq_len
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    yield f"{config.name}: {parameters:,} parameters, {hf_config.head_in_words}, vocabulary {hf_config.vocab_size:,}"
    yield f"data: {len(train_shards):,} training and {len(val_shards):,} validation tokens in {config.data.path}"
    yield (
        f"{config.train.steps:,} steps of {tokens_per_step:,} tokens, "
        f"{config.train.steps * tokens_per_step / len(train_shards):.2f} epochs; "
        f"{accelerator.num_processes} x {device}, {engine_name(accelerator)}, {precision}, "
        f"{accumulation} x {config.train.micro_batch} sequences a step and process"
    )


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def _note_non_finite(path: Path, steps: list[tuple[int, float, float]], batches: TrainingBatches) -> None:
    """Write down which windows of the training tokens each of these steps saw, so that it can be replayed."""
    with path.open("a") as file:
        for step, loss, grad_norm in steps:
            record = {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                "windows": batches.windows_of(step - 1),
            }
            file.write(json.dumps(record) + "\n")


def _not_finite(what: str, run_folder: Path) -> UserError:
    newest = ckpt.checkpoints(run_folder)
    return UserError(
        f"{what}. Nothing was saved after it; last checkpoint: {newest[-1] if newest else 'none'}. Lower optim.lr or "
        "lengthen optim.warmup_steps, then go on with --resume auto or start under another name."
    )


def _evaluation_line(step: int, evaluation: dict[str, float]) -> str:
    line = f"step {step:>6}  validation loss {evaluation['loss']:.4f}  accuracy {evaluation['accuracy']:.1%}"
    if "target_over_median_distance" in evaluation:
        line += (
            f"  distance to the target {evaluation['target_over_median_distance']:.2f}, "
            f"to the nearest centre {evaluation['nearest_over_median_distance']:.2f} of the median"
        )
    return line


@contextmanager
def _interruptible(wait_for_step: bool) -> Iterator[Callable[[], int]]:
    """A function that tells which signal came, 0 for none: Ctrl-C, or a cluster's SIGTERM or SIGUSR1.

    A second one stops at once; so does the first Ctrl-C where nobody wants to wait.
    """
    asked: list[tuple[int, float]] = []

    def on_signal(number: int, frame: object) -> None:
        now = time.monotonic()
        # A cluster and its launcher may both pass on one signal; that is not somebody's second Ctrl-C.
        if (number == signal.SIGINT and not wait_for_step) or (asked and now - asked[0][1] > 2):
            raise KeyboardInterrupt
        if not asked:
            asked.append((number, now))
            os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: asked[0][0] if asked else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stopped(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of a run that did not finish; what is not expected is raised again."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"error: {str(error).splitlines()[0]} Lower train.micro_batch (and eval.micro_batch), or set "
            "train.activation_checkpointing = true; neither changes what is computed."
        ), 2
    if isinstance(error, Preempted):
        return str(error), EXIT_PREEMPTED
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return (
            f"error: process {os.environ.get('RANK', '0')} lost contact with another one: {str(error).splitlines()[0]} "
            "The cause is in the output of the process that ended first. Go on with --resume auto."
        ), EXIT_HUNG
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; go on from the last checkpoint with --resume auto", 130
    raise error


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        main(load_run_config(sys.argv[1:]))
    except BaseException as error:
        message, code = stopped(error)
        print(message, file=sys.stderr)
        sys.exit(code)
