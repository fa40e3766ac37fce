"""Pretrain a GPT-2 with a harmonic or a softmax head.

    python train.py --config configs/quickstart.toml [--section.key value ...]
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train.py --config configs/gpt2_small_harmonic.toml

Read it once, downwards: `run` sets up, `loop` trains, `optimizer_step` is one step. `--help` lists every setting.

Exit codes: 0 finished; 2 bad input or a failure, with a message that says what to do; 70 a process hung or lost contact
with the others; 75 stopped by SIGTERM, SIGUSR1 or SIGHUP after a checkpoint, to be resumed; 130 interrupted by Ctrl-C.
"""

import sys

import hgpt.run  # noqa: F401  # isort: skip  (first: Ctrl-C and a missing package then end it without a traceback)
import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from torch import Tensor, nn

from hgpt.data.baselines import unigram_log_p
from hgpt.data.batches import TrainingBatches
from hgpt.data.shards import SPLITS, TokenShards, fingerprint, same_data
from hgpt.data.verify import verify
from hgpt.hardware import device_name
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import Checkpoint, Checkpoints
from hgpt.run.config import RunConfig
from hgpt.run.energy import check_country
from hgpt.run.engines import Engine, weights_fingerprint
from hgpt.run.evaluation import Evaluation, Validation
from hgpt.run.optim import build_optimizer, learning_rate, set_learning_rate, training_loss
from hgpt.run.report import Recent, Report, Speed
from hgpt.run.settings import load_run_config
from hgpt.run.stop import LastingOutput, StopSignals, Watchdog, explain
from hgpt.source import check_tokenizer, initialize_from, initialize_radii, load_teacher, new_model, shape_of


def main(config: RunConfig) -> dict[str, float]:
    """Train the run of `config`; returns the values of the last evaluation (`Validation.values`)."""
    check_country(config.log.energy_country)
    engine = Engine.start(config)  # the launcher chooses the processes, and whether DDP, ZeRO or FSDP trains the model
    with Watchdog(config.train.hang_timeout) as watchdog, StopSignals(engine) as signals:
        validation = run(config, engine, watchdog, signals)
    engine.end()
    return validation.values


def run(config: RunConfig, engine: Engine, watchdog: Watchdog, signals: StopSignals) -> Validation:
    """Set up a run, and train it; returns the last evaluation. `engine.together`: if one process fails, all stop."""
    # Data first: most mistakes are in the data settings, and should show at once.
    path, vocab_size = config.data.path, config.data.vocab_size
    splits = engine.together(lambda: [TokenShards.open(path, split, vocab_size) for split in SPLITS])
    train_shards, val_shards = splits
    evaluation = engine.together(lambda: Evaluation(train_shards, val_shards, config))
    batches = TrainingBatches(
        train_shards,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        rank=engine.rank,
        world_size=engine.world_size,
        device=engine.device,
    )
    engine.configure(batches.accumulation)
    verifying = config.data.verify and engine.is_local_main  # each node reads its own disk
    engine.together(lambda: verify(path, vocab_size) if verifying else None)
    data = engine.together(lambda: fingerprint(splits, whole=verifying))
    engine.compare({f"the data in {path}": data}, same_data)
    engine.learn_from(engine.together(lambda: load_teacher(config, train_shards, engine.say)))  # train.distill_from

    # ------------------------------------------------------------------------------------------------------------
    # The run folder: a new one, or one to resume. Nothing is written yet.
    watchdog.beat(0, "looking for a checkpoint")
    checkpoints = Checkpoints(config, train_shards, data, engine)
    resumed = checkpoints.to_resume()

    # ------------------------------------------------------------------------------------------------------------
    # Model and optimiser. Every process draws the same initial weights; dropout then differs between processes.
    watchdog.beat(0, "building the model")
    set_seed(config.train.seed)
    use_unigram = resumed is None and config.model.head.radius == "learned" and config.model.head.radius_init != "zero"
    log_p = engine.from_main(lambda: unigram_log_p(train_shards)) if use_unigram else None
    model = engine.together(lambda: build_model(config, train_shards, resumed, log_p, engine))
    if config.model.init_from is not None and resumed is None and engine.world_size > 1:
        engine.compare({f"the weights of model.init_from = {config.model.init_from}": weights_fingerprint(model)})
    set_seed(config.train.seed, device_specific=True)
    model.to(engine.device)
    optimizer = build_optimizer(model, config.optim)
    states = {} if resumed is None else engine.together(lambda: resumed.load_optimizer(model, optimizer))
    random_state = resumed is None or engine.together(lambda: resumed.load_random_state(engine.rank))
    if not random_state and config.model.dropout > 0:
        engine.say("the checkpoint has no random state for this process: dropout draws other random numbers")
    model, optimizer = engine.prepare(model, optimizer, states)
    model.train()

    # ------------------------------------------------------------------------------------------------------------
    # Print what the run will do, in three lines.
    hf_config, tokens_per_step = engine.model_config, config.train.global_batch * config.data.seq_len
    engine.say(
        f"{config.name}: {engine.num_parameters:,} parameters, {hf_config.head_in_words}, "
        f"vocabulary {hf_config.vocab_size:,}\n"
        f"data: {len(train_shards):,} training and {len(val_shards):,} validation tokens in {config.data.path}\n"
        f"{config.train.steps:,} steps of {tokens_per_step:,} tokens, "
        f"{config.train.steps * tokens_per_step / len(train_shards):.2f} epochs; "
        f"{engine.world_size} x {device_name(engine.device)}, {engine.name}, {engine.precision}, "
        f"{batches.accumulation} x {config.train.micro_batch} sequences a step and process"
    )
    evaluation.compare_with_unigram(engine)
    return loop(batches, evaluation, checkpoints, model, optimizer, watchdog, signals)


def build_model(
    config: RunConfig, shards: TokenShards, resumed: Checkpoint | None, log_p: np.ndarray | None, engine: Engine
) -> HGPTForCausalLM:
    """On the CPU: the resumed model, or a new one with random weights or those of init_from; radii start at `log_p`."""
    model_config = config.model.to_hf(
        vocab_size=shards.vocab_size, seq_len=config.data.seq_len, end_of_text=shards.end_of_text
    )
    model_config.exponent *= config.train.exponent_factor(0 if resumed is None else resumed.state.step)
    if resumed is not None:
        model = resumed.load_model(model_config)
    else:
        model = new_model(model_config, config.model.backbone)
        if config.model.init_from is not None:
            same_tokenizer = check_tokenizer(config.model.init_from, shards)
            for note in [same_tokenizer, *initialize_from(model, config.model.init_from)]:
                engine.say(f"model.init_from: {note}")
        initialize_radii(model, config.model.head.radius_init, log_p)
    model.lm_head.label_smoothing = config.train.label_smoothing  # in training mode only; not exported
    engine.set_up_blocks(model)
    return model


def loop(
    batches: TrainingBatches,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watchdog: Watchdog,
    signals: StopSignals,
) -> Validation:
    """Train to the last step, with evaluations, checkpoints and log lines on the way; returns the last evaluation."""
    config, engine, resumed = checkpoints.config, checkpoints.engine, checkpoints.resumed
    step, validation = (0, None) if resumed is None else (resumed.state.step, resumed.state.validation)
    # `claim` creates the run folder; nothing was written before.
    with checkpoints.claim(), Report(config, engine, checkpoints) as report:
        signals.training = True
        # One pass more than there are steps: the last pass only evaluates and saves.
        while True:
            engine.set_exponent(step)
            last = step >= config.train.steps
            evaluating = last or step % config.eval.every == 0
            saving = checkpoints.due(step, last=last, stopping=signals.seen > 0)
            if evaluating:
                watchdog.beat(step, "evaluation")
                with report.phase("evaluation"):
                    validation = evaluation(model, step, engine)
                report.evaluated(validation)  # ends the run if the loss is not finite
            if evaluating or saving:
                report.energy(step)
            if saving:
                watchdog.beat(step, "saving a checkpoint")
                with report.phase("save"):
                    checkpoints.save(step, validation)
            if last:
                break
            signals.leave_if_seen(step, checkpoints)  # exit code 75, or 130 for Ctrl-C

            # One optimiser step. The learning rate is set first: DeepSpeed steps in the backward pass.
            watchdog.beat(step, "training")
            lr = learning_rate(step, config.train.steps, config.optim)
            set_learning_rate(optimizer, lr)
            report.stepped(*optimizer_step(step, model, optimizer, batches, engine, report))
            step += 1

            # Losses stay on the device, because reading them is a sync. They are read for a log line, and before every
            # evaluation and checkpoint, so that no diverged model is saved.
            logging = report.due(step)
            signals.update(together=logging)
            if logging or signals.seen or checkpoints.due(step) or step % config.eval.every == 0:
                recent = report.read(step, lr, batches)  # ends the run after too many non-finite steps
                checkpoints.writer.wait(only_look=True)  # raises the error of writing a checkpoint in the background
            if logging:
                speed = report.speed()
                report.log(step, log_line(step, lr, recent, speed, config, engine), speed)
        checkpoints.writer.wait()
        report.finished(validation, evaluation.unigram)
    return validation


def optimizer_step(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    engine: Engine,
    report: Report,
) -> tuple[Tensor, Tensor]:
    """One optimiser step; returns this process's mean loss and the gradient norm before clipping, () on the device."""
    step_loss = torch.zeros((), device=engine.device)
    for micro_step in range(batches.accumulation):
        with report.phase("data"):
            inputs, targets = batches(step, micro_step)
        with engine.accelerator.accumulate(model):  # reduces gradients over processes in the last micro-batch only
            with report.phase("forward"):
                loss = training_loss(model, inputs, targets, engine)
            with report.phase("backward"):
                engine.accelerator.backward(loss)  # divides by the number of micro-batches
            step_loss += loss.detach() / batches.accumulation
            with report.phase("step"):
                if engine.accelerator.sync_gradients:  # the last micro-batch
                    grad_norm = engine.clip(model)
                optimizer.step()  # this and zero_grad do nothing before the last micro-batch
                optimizer.zero_grad()
    return step_loss, grad_norm


def log_line(
    step: int, lr: float, recent: Recent, speed: Speed, config: RunConfig, engine: Engine
) -> dict[str, float | None]:
    """The values of a "train" record in metrics.jsonl and the trackers; `Report.log` leaves out None."""
    return {
        "loss": recent.loss,
        "lr": lr,
        "grad_norm": recent.grad_norm,
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "tokens": step * config.train.global_batch * config.data.seq_len,
        "tokens_per_second_per_process": speed.tokens_per_second / engine.world_size,
        **{f"seconds_{phase}": seconds for phase, seconds in speed.seconds.items()},
        "memory_gib": max(speed.memory),
        "spikes": recent.spikes,
        "skipped": recent.skipped,
        "slowest_process": speed.own.index(max(speed.own)) if engine.world_size > 1 else None,
    }


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.stdout, sys.stderr = LastingOutput(sys.stdout), LastingOutput(sys.stderr)
    try:
        main(load_run_config(sys.argv[1:], shape_of))
    except BaseException as error:
        message, code = explain(error)
        print(message, file=sys.stderr)
        sys.exit(code)
