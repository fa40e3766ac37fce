"""Pretrain a GPT-2 with a harmonic or a softmax head.

    python train.py --config configs/quickstart.toml [--section.key value ...]
    accelerate launch train.py --config configs/gpt2_small_harmonic.toml

Read it once, downwards. `--help` lists every setting.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env, set_seed
from tqdm import tqdm

from hgpt import checkpoint as ckpt
from hgpt.baselines import unigram_loss
from hgpt.batches import TrainingBatches
from hgpt.errors import UserError
from hgpt.evaluation import evaluation_windows, head_diagnostics, validation_loss
from hgpt.metrics import MetricsLog, Throughput, build_trackers, device_name, flops_per_token, peak_flops
from hgpt.model_card import model_card
from hgpt.modeling_hgpt import HGPTForCausalLM
from hgpt.optim import build_optimizer, learning_rate, set_learning_rate
from hgpt.pretrained import initialize_from
from hgpt.run_config import CONFIG_FILE, RunConfig, check_resume, load_run_config, settings, write_toml
from hgpt.shards import TokenShards, verify
from hgpt.tokenizer import hf_tokenizer


def main(config: RunConfig) -> dict[str, float]:
    """Train as `config` says; returns the last evaluation (`loss`, and the diagnostics of the head)."""
    # ------------------------------------------------------------------------------------------------------------
    # Data. Opened first: most mistakes are here, and they should cost no time.
    train_shards = TokenShards.open(config.data.path, "train", config.data.vocab_size)
    val_shards = TokenShards.open(config.data.path, "val", config.data.vocab_size)
    evaluation_windows(val_shards, config.data.seq_len)  # raises if there is not one sequence to evaluate
    model_config = config.model.to_hf(
        vocab_size=train_shards.vocab_size, seq_len=config.data.seq_len, end_of_text=train_shards.end_of_text
    )

    # ------------------------------------------------------------------------------------------------------------
    # Processes and precision.
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(config.train.precision),
        # Accumulation follows from the batch settings below; the loader is ours and knows no end.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}, whose checkpoints are not supported; launch "
            "one process, or DDP (accelerate's MULTI_GPU or MULTI_CPU)"
        )
    batches = TrainingBatches(
        train_shards,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
        seed=config.train.seed,
    )
    accelerator.gradient_accumulation_steps = batches.accumulation
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
    if resume_from is not None:
        model = HGPTForCausalLM.from_pretrained(resume_from / ckpt.MODEL, dtype=torch.float32)
    else:
        model = HGPTForCausalLM(model_config)
        if config.model.init_from is not None:
            for note in initialize_from(model, config.model.init_from):
                say(f"{config.model.init_from}: {note}")
    model.lm_head.label_smoothing = config.train.label_smoothing  # in training mode only, and not exported
    set_seed(config.train.seed, device_specific=True)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        for block in model.transformer.h:  # in place: parameters keep their names
            # Blocks share one compilation, unless each has a constant of its own.
            block.compile(isolate_recompiles=config.model.scale_attn_by_inverse_layer_idx)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, config.optim)
    if resume_from is not None:
        ckpt.load_optimizer(resume_from, model, optimizer)
        if not ckpt.load_random_state(resume_from, accelerator.process_index) and config.model.dropout > 0:
            say("the checkpoint has no random state for this process: dropout goes on with other random numbers")
    plain_model, plain_optimizer = model, optimizer
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    # ------------------------------------------------------------------------------------------------------------
    # Reporting. The run folder is made when nothing in the input can be wrong any more, and when no process still looks
    # whether it exists.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            write_toml(config, run_folder / CONFIG_FILE)
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
    for line in _introduction(config, plain_model, train_shards, val_shards, accelerator, device, batches.accumulation):
        say(line)
    if unigram is not None:
        say(f"a unigram model of this data has validation loss {unigram:.4f}")

    def save(step: int) -> Path:
        target = run_folder / ckpt.CHECKPOINTS / f"step_{step:07d}"
        state = ckpt.TrainState(
            step=step,
            tokens=step * tokens_per_step,
            validation_loss=validation,
            validation_step=validation_step,
            settings=settings(config),
            data=data_id,
            world_size=accelerator.num_processes,
        )
        with ckpt.atomic_folder(target) if accelerator.is_main_process else nullcontext() as folder:
            accelerator.wait_for_everyone()  # the folder is there
            folder = folder or ckpt.partial_folder(target)
            ckpt.save_random_state(folder, accelerator.process_index)
            accelerator.wait_for_everyone()  # every process has written
            if accelerator.is_main_process:
                ckpt.save_training_state(folder, plain_model, plain_optimizer, state)
                _export(plain_model, folder / ckpt.MODEL, config, train_shards, state)
                ckpt.write_manifest(folder)
        if accelerator.is_main_process:
            ckpt.point_latest(run_folder, target)
            ckpt.remove_old(run_folder, config.checkpoint.keep_last)
        accelerator.wait_for_everyone()
        return target

    # ------------------------------------------------------------------------------------------------------------
    # The loop runs steps + 1 times: the last pass only evaluates and saves.
    first_step, last_evaluation = step, {}
    throughput = Throughput()
    pending: list[torch.Tensor] = []  # losses since the last log, still on the device
    stop = False  # Ctrl-C came, and all processes know
    # disable=None: no bar where standard error is not a terminal; lines are printed there instead.
    hide = None if accelerator.is_main_process else True
    bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=hide, dynamic_ncols=True, smoothing=0.05)
    with _interruptible(config.checkpoint.on_interrupt) as interrupted, bar:
        while True:
            last = step == config.train.steps
            pause = time.perf_counter()
            if last or step % config.eval.every == 0:
                validation_step = step
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
                    raise _not_finite(f"the validation loss after step {step} is {validation}", run_folder)
                if log is not None:
                    log.write("eval", step, last_evaluation)
                    bar.write(_evaluation_line(step, last_evaluation))
            if step > first_step and (last or stop or step % config.checkpoint.every == 0):
                target = save(step)
                if stop and not last:
                    raise KeyboardInterrupt(f"interrupted after step {step}, saved {target}; go on with --resume auto")
            throughput.pause(time.perf_counter() - pause)
            if last:
                break

            # One optimiser step. The learning rate is set before the backward pass, in which some engines step.
            lr = learning_rate(step, config.train.steps, config.optim)
            set_learning_rate(plain_optimizer, lr)
            step_loss = torch.zeros((), device=accelerator.device)
            for micro_step in range(batches.accumulation):
                inputs, targets = batches(step, micro_step)
                with accelerator.accumulate(model):
                    loss = model(
                        inputs.to(accelerator.device, non_blocking=True),
                        shift_labels=targets.to(accelerator.device, non_blocking=True),
                        use_cache=False,
                    ).loss
                    accelerator.backward(loss)  # divides by the number of micro-batches
                    step_loss += loss.detach() / batches.accumulation
                    if accelerator.sync_gradients:
                        limit = config.optim.grad_clip or float("inf")
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                    optimizer.step()
                    optimizer.zero_grad()
            pending.append(step_loss)
            throughput.add(tokens_per_step)
            step += 1
            bar.update()

            # The device is asked for its losses only now and then, but always before they would be saved or evaluated.
            due = step % config.log.every == 0 or step in (first_step + 1, config.train.steps)
            if accelerator.num_processes == 1:
                stop = interrupted()
            elif due:  # processes see a signal at different moments, and have to stop after the same step
                asked = torch.tensor(int(interrupted()), device=accelerator.device)
                stop = bool(accelerator.reduce(asked, reduction="sum"))
            if due or stop or step % config.checkpoint.every == 0 or step % config.eval.every == 0:
                losses = accelerator.reduce(torch.stack(pending), reduction="mean").tolist()
                _check_finite(losses, step, lr, float(grad_norm), run_folder)
                pending.clear()
                if due and log is not None:
                    rate = throughput.read()
                    values = {"loss": losses[-1], "lr": lr, "grad_norm": float(grad_norm), "tokens_per_second": rate}
                    if peak is not None:
                        values["mfu"] = rate * flops / (peak * accelerator.num_processes)
                    values["tokens"] = step * tokens_per_step
                    log.write("train", step, values)
                    shown = {"loss": f"{losses[-1]:.3f}", "tok/s": f"{rate:,.0f}"}
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
    say(f"the model is in {run_folder / ckpt.LATEST / ckpt.MODEL}; python sample.py --checkpoint {run_folder}")
    accelerator.end_training()
    return last_evaluation


def _mixed_precision(precision: str) -> str:
    """Accelerate's name of the precision of a run; UserError when the launcher asks for another one."""
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise UserError(
            f"the launcher asks for mixed precision {launcher}, and train.precision is {precision}: it comes from the "
            "run's configuration alone; set mixed_precision to no in the launcher's"
        )
    return "no" if precision == "fp32" else precision


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


def _export(
    model: HGPTForCausalLM, folder: Path, config: RunConfig, shards: TokenShards, state: ckpt.TrainState
) -> None:
    """The Hugging Face model with its tokenizer and its card."""
    model.save_pretrained(folder)
    tokenizer_file = Path(config.data.path) / "tokenizer.json"
    if tokenizer_file.exists():  # a bare nanoGPT folder has none
        hf_tokenizer(tokenizer_file, config.data.seq_len, shards.end_of_text).save_pretrained(folder)
    card = model_card(
        model.config,
        name=config.name,
        parameters=model.num_parameters(),
        data=config.data.path if shards.meta is None else shards.meta.source,
        tokens=state.tokens,
        steps=state.step,
        validation_loss=state.validation_loss,
        validation_step=state.validation_step,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _introduction(
    config: RunConfig,
    model: HGPTForCausalLM,
    train_shards: TokenShards,
    val_shards: TokenShards,
    accelerator: Accelerator,
    device: str,
    accumulation: int,
) -> Iterator[str]:
    """What is about to happen, in three lines."""
    tokens_per_step = config.train.global_batch * config.data.seq_len
    head = f"harmonic head, n = {model.config.exponent:.4g}" if model.config.head == "harmonic" else "softmax head"
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    yield f"{config.name}: {model.num_parameters():,} parameters, {head}, vocabulary {model.config.vocab_size:,}"
    yield f"data: {len(train_shards):,} training and {len(val_shards):,} validation tokens in {config.data.path}"
    yield (
        f"{config.train.steps:,} steps of {tokens_per_step:,} tokens, "
        f"{config.train.steps * tokens_per_step / len(train_shards):.2f} epochs; "
        f"{accelerator.num_processes} x {device}, {precision}, "
        f"{accumulation} x {config.train.micro_batch} sequences a step and process"
    )


def _check_finite(losses: list[float], step: int, lr: float, grad_norm: float, run_folder: Path) -> None:
    """Raise UserError when one of the `losses` of the steps up to `step`, or the last gradient, is not finite."""
    rest = f"(learning rate {lr:.3g}, last gradient norm {grad_norm:.3g})"
    for at, loss in enumerate(losses, start=step - len(losses) + 1):
        if not math.isfinite(loss):
            raise _not_finite(f"the loss of step {at} is {loss} {rest}", run_folder)
    if not math.isfinite(grad_norm):
        raise _not_finite(f"the gradient of step {step} is not finite {rest}", run_folder)


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
def _interruptible(wait_for_step: bool) -> Iterator:
    """A function that tells whether Ctrl-C or SIGTERM came. A later one stops at once (the first, if not waited)."""
    asked: list[float] = []

    def on_signal(number: int, frame: object) -> None:
        now = time.monotonic()
        # A cluster and its launcher may both pass on one signal; that is not somebody's second Ctrl-C.
        if not wait_for_step or (asked and now - asked[0] > 2):
            raise KeyboardInterrupt
        if not asked:
            asked.append(now)
            os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        main(load_run_config(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(
            f"error: {str(error).splitlines()[0]} Lower train.micro_batch (and eval.micro_batch), or set "
            "train.activation_checkpointing = true; neither changes what is computed.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; go on from the last checkpoint with --resume auto", file=sys.stderr)
        sys.exit(130)
