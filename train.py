"""Trains one part of the chain: `python train.py --config configs/tora.py:stage=1 --weights DIR --workdir DIR`.

The config names the job: "vae" (configs/vae.py), "motion_vae" or "tora". Each starts from a release folder, or from
random weights, and ends with one, WORKDIR/release, for the next job and for `sample.py`.
"""

import signal

# Until the libraries are loaded Ctrl-C just ends the process: raised inside their imports it would be a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import functools
import json
import shlex
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tora_jax.configs import common

from tora_jax import command_line, sharding
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.checkpoints.manager import Manager, holds_any
from tora_jax.checkpoints.weights import orbax_path
from tora_jax.data import pipeline, placement
from tora_jax.errors import UserError
from tora_jax.evals import validation
from tora_jax.io import files
from tora_jax.io.files import tuples
from tora_jax.training import lora, record
from tora_jax.training.job import Job
from tora_jax.training.log import Log
from tora_jax.training.step import jit_init_state, jit_train_step

USAGE = """Trains one part of the chain; configs/*.py have the launch lines.

Writes into --workdir: checkpoints/, metrics.jsonl, TensorBoard scalars, samples/ and at the end release/.
"""


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "Config of a job, such as configs/vae.py.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_string("workdir", None, "Where everything is written.", **to)
    flags.DEFINE_string("weights", None, "Release folder to start from; none = random weights.", **to)
    flags.DEFINE_boolean("distributed", False, "One of several processes; docs/scaling.md has launch lines.", **to)
    flags.DEFINE_boolean("quiet", False, "No progress bar.", **to)


def main(argv: list[str], check_interrupt) -> None:
    # ----- Flags and config -------------------------------------------------------------------------------------
    args = command_line.parse(argv, define_flags, USAGE, common.training())
    if args.workdir is None:
        raise UserError("--workdir is missing; name a folder for checkpoints, metrics and the trained weights")
    if args.distributed:
        command_line.join_processes()
    first = jax.process_index() == 0  # writes what is written once
    config = tuples(args.config.to_dict())
    command_line.end_if_hung(config["hang_after"])
    workdir = files.path(args.workdir)
    orbax_path(workdir)
    files.check_writable(workdir, f"--workdir {workdir}")
    released = workdir / "release"
    if released.exists():
        if config["resume"] and config["restartable"]:  # no error: whoever restarts what fails would never end
            print(f"{released}: exists, so this run is finished")
            return
        raise UserError(f"{released}: exists, so this run is finished; choose another --workdir")
    goes_on = config["resume"] and holds_any(workdir / "checkpoints")
    if config["resume"] and not config["restartable"] and not goes_on:
        raise UserError(
            f"{workdir}: nothing to go on with; start without --config.resume, or set --config.restartable, too"
        )
    weights = record.weights_of(workdir, args.weights, goes_on)
    command_line.use_compilation_cache()
    mesh, rules = sharding.make_mesh(config["mesh"]), tuple(config["rules"].items())

    models = assembly.outline(config, weights)
    job = Job(config, models.backbone, models.parts)

    # ----- Data -------------------------------------------------------------------------------------------------
    open_split = functools.partial(
        pipeline.batches,
        seed=config["seed"],
        shard=placement.shard_of(mesh),
        tokenizer=models.tokenizer if job.name == "tora" else None,
        latent_frames=models.vae.latent_frames,
    )
    data = config["data"]
    opened = open_split(data, data["split"])
    if first and not args.quiet:
        print(opened.table(), flush=True)
    batches = placement.Placed(opened, mesh)

    # ----- Parameters on the mesh, and what of them trains ------------------------------------------------------
    used, place = job.used_parts(opened.made), functools.partial(sharding.param_shardings, mesh=mesh, rules=rules)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # random ones are made there, and then laid out
        where = sharding.only_parts(used, place)  # a compiled function takes only what it uses
        params = dict(assembly.load(config, weights, config["seed"], place=where).params)
        if config["from_video_vae"]:
            params["motion_vae"] = params["vae"]
        trained, frozen = job.split(params)
        trained = jax.device_put(trained, place(trained))
        frozen = {
            path: jax.device_put(frozen[path], on_mesh) if path.partition("/")[0] in used else np.asarray(frozen[path])
            for path, on_mesh in place(frozen).items()
        }
        began_with = record.fingerprints(weights, frozen, record.read(workdir) if goes_on else None)
        optimizer = job.optimizer(trained)
        state = jit_init_state(trained, optimizer, place)
    del params, trained  # the state has copies

    # ----- The step, and how its result is judged ---------------------------------------------------------------
    train_step = jit_train_step(job, optimizer, state)
    key = jax.random.key(config["seed"])
    held_out = {**data, "crop": 0, "workers": 0}
    open_held_out = functools.partial(open_split, held_out, data["validation"], training=False)
    samples = workdir / "samples"
    judge = validation.make(config, models, open_held_out, mesh, samples)

    # ----- Resume -----------------------------------------------------------------------------------------------
    manager = Manager(workdir / "checkpoints", config["keep"], best="objective")
    if manager.steps() and not config["resume"]:
        raise UserError(f"{workdir}: holds a run already; go on with it by --config.resume, or choose another folder")
    if config["resume"] and (found := manager.restore(state, added="peak")):
        state = found.state
        batches.set_state(found.data)
    record.hold(workdir, config, began_with, opened.identity(), mesh, goes_on=goes_on, first=first)
    start = step = int(state.step)
    log = Log(workdir, start, config["steps"], args.quiet, first)

    # ----- The loop ---------------------------------------------------------------------------------------------
    judged = {}
    with contextlib.closing(batches), sharding.use(mesh, rules), manager, log:
        for step in range(start + 1, config["steps"] + 1):
            command_line.end_if_hung(config["hang_after"])
            batch = next(batches)
            state, metrics = train_step(state, frozen, batch, key)
            log.add(step, metrics, job.count_tokens(batch))
            final, stop = step == config["steps"], manager.preempted(step)
            if final or stop or step % config["log_every"] == 0:
                log.flush()
            judged = {}
            if final or step % config["eval_every"] == 0:
                judged = log.write(step, judge(job.combine(state.ema, frozen), step))
                log.show(step, samples)
            # The checkpoint is written before the next batch is drawn, so that the data goes on exactly there.
            if final or stop or judged or step % config["save_every"] == 0:
                log.flush(send=True)
                manager.save(step, state, batches.get_state(), judged)
            if log.skipped >= max(1, config["skip_at_most"]):
                manager.save(step, state, batches.get_state(), judged)  # skipped steps have not changed it
                raise UserError(
                    f"{log.skipped} steps in a row to step {step} have a loss or a gradient that is not finite, or a "
                    f"spike (--config.skip_above={config['skip_above']:g}); the state before them is saved. Go on with "
                    "another lr, clip or dtype (--config.resume_anyway)"
                )
            check_interrupt()
            if stop:
                break
        if step < config["steps"]:
            print(f"stopped by a signal at step {step}; go on with --config.resume", file=sys.stderr)
            if config["restartable"]:  # a launcher takes 0 for finished
                sys.exit(128 + signal.SIGTERM)
            return
        judged = judged or judge(job.combine(state.ema, frozen), step)  # killed between the last step and the release

    # ----- The release folder -----------------------------------------------------------------------------------
    params = sharding.to_host(job.combine(state.ema, frozen))
    if job.name != "tora" and validation.changes_latents(state.trained):
        normalise = validation.latent_statistics(config, models, open_held_out, mesh)
        statistics = normalise(params[job.name])
        if "scale" in params[job.name]:
            params[job.name].update(statistics)
        else:  # CogVideoX's: one number, a field of the config
            scaling = 1 / float(np.mean(statistics["scale"]))
            print(f"towards unit variance of the latents, set vae.scaling to {scaling:.3g}", file=sys.stderr)
    adapter = sharding.to_host(state.ema) if job.adapts else None
    if not first:
        return
    if job.adapts:
        lora.save(workdir / "adapter.safetensors", adapter, config["lora"]["alpha"])
    launch = shlex.join(["python", *argv])
    figures = json.dumps(judged, indent=2)
    readme = f"Trained by\n\n    {launch}\n\nSeed {config['seed']}. On held-out clips:\n\n{figures}\n"
    sections = assembly.sections(config)
    release.save(released, sections, params, assembly.tokenizer_path(weights), readme)
    print(f"wrote {released}")


if __name__ == "__main__":
    command_line.run(main, sys.argv, "go on from the last checkpoint with --config.resume", alone=True)
