"""The command line: `gbnzoo quickstart | train | plan | ladder | report | watch | walk | diagnose | publish`."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from gbnzoo import rates, report, train, tuning, walk_law
from gbnzoo.card import read_results
from gbnzoo.data import data_folder, load_images, num_train_images
from gbnzoo.diagnose import PARTS, as_text, diagnose, find_subject
from gbnzoo.diagnose import write as write_diagnosis
from gbnzoo.jobs import FailedJobsError, run_jobs, training_job
from gbnzoo.launch import is_launched
from gbnzoo.metrics import evaluate
from gbnzoo.publish import publish, record_result, refresh
from gbnzoo.random_walk import simulate
from gbnzoo.readmes import write_readmes
from gbnzoo.recipe import Recipe, load_recipe
from gbnzoo.regime import RUNGS, Layout, Regime
from gbnzoo.train import plain_errors
from gbnzoo.upload import hub_files, upload
from gbnzoo.watch import watch

app = typer.Typer(
    help="Ghost-BatchNorm models for timm, and the long large-batch recipes that train them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.main)

QUICKSTART_RECIPE, QUICKSTART_OVERRIDES = "recipes/digits/resnet8_thin_gbn.yaml", ()

RecipePath = Annotated[str, typer.Argument(help="YAML file, e.g. recipes/mnist/mlp5_gbn.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="single keys, e.g. large.batch_size=2048")]
DataDir = Annotated[Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")]
Out = Annotated[Path, typer.Option(help="where the runs' folders are made")]
Hub = Annotated[Path, typer.Option(help="where hub folders and results.csv are kept")]
Plot = Annotated[Path, typer.Option(help="PNG file of the ladder")]


@app.command()
def quickstart(
    out: Out = Path("quickstart"),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each rung, with seeds 0, 1, …")] = 1,
) -> None:
    """The whole thread on embedded data: train the ladder on digits, publish its last rung, load it with timm, evaluate."""
    import timm

    with plain_errors():
        runs = train_ladder(QUICKSTART_RECIPE, QUICKSTART_OVERRIDES, range(seeds), out / "runs", data_dir=None)
        rows = report.ladder_rows(runs)
        print(report.ladder_table(rows))
        report.ladder_plot(rows, out / "ladder.png")
        print(f"\nplot: {out / 'ladder.png'}")

        recipe = load_recipe(QUICKSTART_RECIPE, QUICKSTART_OVERRIDES, rung="ra", seed=0)
        folder = publish(out / "runs" / recipe.run_name, out / "hub")
        print(f"published: {folder}")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        test_set = load_images(recipe.data.name, "test")
        top1_percent = evaluate(model, test_set.batches(train.EVALUATION_BATCH_SIZE)).top1_percent
        trained = report.top1_percent(out / "runs" / recipe.run_name)
        print(
            f"timm.create_model('local-dir:{folder}', pretrained=True): top-1 {top1_percent:.2f} %; its run: {trained:.2f} %"
        )
        if top1_percent != trained:
            raise ValueError("the published weights do not score what their run did")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="devices")] = 1,
    micro_batch_size: Annotated[int | None, typer.Option(help="samples of one forward pass on one device")] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="training images; else known by the set's name, or counted in the data")
    ] = None,
    data_dir: DataDir = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="also time some updates of the last rung, on CPUs by processes and threads"),
    ] = False,
) -> None:
    """Print what a run of each rung will do, before it does it."""
    with plain_errors():
        recipes = [load_recipe(recipe, overrides or (), rung=rung) for rung in RUNGS]
        train.check_recipe(recipes[0])
        if not (num_samples or data_folder(data_dir)):  # a folder may hold fewer images
            num_samples = num_train_images(recipes[0].data.name, recipes[0].data.holdout)
        shape = train.known_shape(recipes[0])
        if not num_samples:
            train_set, _ = train.load_sets(recipes[0], data_dir)
            num_samples, shape = len(train_set), (train_set.input_size, len(train_set.class_names))
        what = f"{recipes[0].model.name} on {recipes[0].data.name}"
        print(f"{recipe}: {what}, {num_samples:,} training images, {processes} process(es)\n")
        for each in recipes:
            print(_planned(each, each.regime(num_samples), shape, processes, micro_batch_size))
        if measure:
            _print_rates(recipe, overrides or (), recipes[-1], data_dir)


@app.command()
def ladder(
    recipe: RecipePath,
    overrides: Overrides = None,
    rungs: Annotated[str, typer.Option(help="which rungs, in this order")] = " ".join(RUNGS),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each rung, with seeds 0, 1, …")] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="runs at once, each a process with its share of the threads and GPUs")
    ] = 1,
    data_dir: DataDir = None,
    out: Out = Path("runs"),
    tracker: train.Tracker = None,
    plot: Plot = Path("ladder.png"),
) -> None:
    """Train every rung of a recipe, go on with those that were stopped, and print the ladder."""
    with plain_errors():
        failure = None
        try:
            runs = train_ladder(
                recipe,
                overrides or (),
                range(seeds),
                out,
                data_dir=data_dir,
                rungs=rungs.split(),
                tracker=tracker,
                jobs=jobs,
            )
        except FailedJobsError as error:
            runs, failure = [out / name for name in error.names], error
            if not runs:
                raise
        rows = report.ladder_rows(runs)
        print(report.ladder_table(rows))
        report.ladder_plot(rows, plot)
        print(f"\nplot: {plot}")
        if failure:
            raise failure


@app.command("watch")
def watch_command(
    run: Annotated[Path, typer.Argument(help="folder of a run that goes on, or is finished")],
    seconds: Annotated[float, typer.Option(min=0.1, help="time between two looks at it")] = 1.0,
) -> None:
    """Show a run as it happens, until it is finished or Ctrl-C; in a pipe, say once how far it is."""
    with plain_errors():
        watch(run, seconds=seconds)


@app.command("publish")
def publish_command(
    folder: Annotated[Path | None, typer.Argument(help="a finished run; with --to a hub folder")] = None,
    hub: Hub = Path("hub"),
    only_result: Annotated[bool, typer.Option("--only-result", help="only its row in results.csv, no weights")] = False,
    to: Annotated[
        str | None, typer.Option(metavar="ORG", help="upload the hub folder to ORG/<name> on the Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make that repo private, where it is new")] = False,
    revision_tag: Annotated[str | None, typer.Option(help="name the revision, besides the weights' hash")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and list a hub folder's files, send nothing")
    ] = False,
) -> None:
    """Make the hub folder of a finished run and its row in results.csv; with --to, upload a hub folder.

    Without a folder, cards and index are generated again from results.csv.
    """
    with plain_errors():
        if (private or revision_tag) and not to:
            raise ValueError("--private and --revision-tag are of an upload; wanted --to ORG too")
        if (to or dry_run or only_result) and not folder:
            raise ValueError("wanted a folder for --to, --dry-run or --only-result")
        if (to or dry_run) and only_result:
            raise ValueError(
                "--only-result writes a run's row of results.csv, and uploads nothing; wanted one of the two"
            )
        if folder is None:
            refresh(hub)
            print(hub / "README.md")
        elif dry_run:
            for file in hub_files(folder, to):
                print(f"{folder / file.name}  {file.num_bytes:,} bytes  sha256 {file.sha256}")
        elif to:
            done = upload(folder, to, private=private, revision_tag=revision_tag)
            print(f"{done.url}: {', '.join(done.changed) or 'nothing had changed'}")
            print(f"commit {done.commit}, tags {', '.join(done.tags)}")
        else:
            print(record_result(folder, hub) if only_result else publish(folder, hub))


@app.command("report")
def report_command(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs, finished or not, or hub folders")] = None,
    out: Annotated[Path, typer.Option(help="folder of the page, its pictures and their data")] = Path("report"),
    results: Annotated[
        Path | None, typer.Option(help="results.csv, for seeds of the same ladders whose runs are not at hand")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file of the ladder, where the runs make one")] = None,
    readmes: Annotated[
        Path | None,
        typer.Option(help="a checkout: write the ladders in its READMEs again, from --results, and no page"),
    ] = None,
) -> None:
    """Compare runs on one page, and print their ladders, mean and sample standard deviation over seeds."""
    with plain_errors():
        if readmes:
            if runs or plot or not results:
                raise ValueError(
                    "--readmes is of --results alone; wanted --results hub/results.csv, no runs and no --plot"
                )
            for path in write_readmes(readmes, read_results(results)):
                print(path)
            return
        records = report.read_runs(runs or ())
        rows = report.report_rows(records, read_results(results) if results else ())
        ladders = report.find_ladders(rows)
        for ladder in ladders:
            if len(ladders) > 1:
                print(f"{ladder[0].ladder}, {ladder[0].split} split\n")
            print(report.ladder_table(ladder) + "\n")
        if plot:
            report.ladder_plot(report.only_ladder(ladders), plot)
            print(f"plot: {plot}")
        print(f"page: {report.write_report(records, rows, out)}")


@app.command("diagnose")
def diagnose_command(
    checkpoint: Annotated[
        str, typer.Argument(help="run, file of its checkpoints/, hub folder, hf-hub:org/name or timm name")
    ],
    data: Annotated[str | None, typer.Option(help="training images; by default the recipe's")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="folder for the results; else diagnosis/<name>")] = None,
    only: Annotated[str, typer.Option(help="which of these")] = ",".join(PARTS),
    samples: Annotated[
        int | None, typer.Option(min=1, help="training images that the loss is the mean over  [default: 2048, or all]")
    ] = None,
    ghosts: Annotated[
        int | None, typer.Option(min=3, help="for the noise scale  [default: 64, or as many as there are images for]")
    ] = None,
    ghost_batch_size: Annotated[int | None, typer.Option(min=1, help="samples of one; by default the recipe's")] = None,
    statistics: Annotated[
        Literal["running", "ghosts"], typer.Option(help="that BatchNorm takes, but for the noise scale")
    ] = "running",
    eigenvalues: Annotated[int, typer.Option(min=1, help="how many of the Hessian's largest")] = 3,
    epsilon: Annotated[float, typer.Option(min=0, help="half the side of the sharpness's box")] = 1e-3,
    subspace: Annotated[int, typer.Option(min=1, help="random directions of the sharpness's variant")] = 100,
    directions: Annotated[int, typer.Option(min=2, help="random directions of the potential")] = 32,
    distance: Annotated[float | None, typer.Option(help="largest of the potential; else that from w_0")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="yours, for the advice; else the run's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="fixes images, augmentation and directions")] = 0,
) -> None:
    """Measure what the training loss is like around a checkpoint, and whether a larger batch would still pay.

    Gradient noise scale, top eigenvalues of the Hessian, sharpness, and the loss against distance along random directions.
    """
    with plain_errors():
        subject = find_subject(checkpoint, data, data_dir)
        found = diagnose(
            subject,
            only=only.split(","),
            samples=samples,
            ghosts=ghosts,
            ghost_batch_size=ghost_batch_size,
            statistics=statistics,
            eigenvalues=eigenvalues,
            epsilon=epsilon,
            subspace=subspace,
            directions=directions,
            distance=distance,
            batch_size=batch_size,
            device=device,
            seed=seed,
            report=lambda part: print(f"{subject.name}: {part} …", file=sys.stderr, flush=True),
        )
        print(as_text(found))
        files = write_diagnosis(found, out or Path("diagnosis") / subject.name.rpartition("/")[2])
        print(f"\nwritten: {', '.join(map(str, files))}")


@app.command("walk")
def walk_command(
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="of E(L(w1) − L(w2))² ~ ‖w1 − w2‖^α, 0 to 2; again for more walks  [default: 1]"),
    ] = None,
    dimensions: Annotated[
        int, typer.Option(min=1, help="of the landscape; 1 is walked exactly, 2 at low temperature")
    ] = 1,
    landscapes: Annotated[int, typer.Option(min=2, help="that the distances are means over")] = 200,
    seed: Annotated[int, typer.Option(help="of landscapes and walkers")] = 0,
    temperature: Annotated[float | None, typer.Option(help="by default low enough to see the law")] = None,
    log_updates: Annotated[
        tuple[float, float] | None, typer.Option(help="natural logarithms of the first and the last number of updates")
    ] = None,
    stepping: Annotated[
        bool | None,
        typer.Option("--stepping/--exact", help="one walker a landscape, or all at once, in 1 or 2 dimensions"),
    ] = None,
    run: Annotated[list[Path] | None, typer.Option(help="draw the weights of this run in the same way")] = None,
    out: Annotated[Path, typer.Option(help="folder for walk.csv and walk.png")] = Path("walk"),
) -> None:
    """Random walks on a random potential: does the distance go like (log t)^(2/α)? Writes CSV and plot."""
    with plain_errors():
        real = [walk_law.run_curve(folder) for folder in run or ()]
        laws = []
        for each in alpha or [1.0]:
            walks = simulate(
                each,
                dimensions,
                landscapes=landscapes,
                seed=seed,
                temperature=temperature,
                log_updates=log_updates,
                stepping=stepping,
            )
            laws.append(walk_law.measure(walks))
        print(walk_law.table(laws) + "\n")
        for path in walk_law.save(laws, out, real):
            print(path)


def train_ladder(
    recipe: str,
    overrides: Sequence[str],
    seeds: Iterable[int],
    out: Path,
    *,
    data_dir: Path | None,
    rungs: Sequence[str] = tuple(RUNGS),
    tracker: str | None = None,
    jobs: int = 1,
) -> list[Path]:
    """Train the rungs of a recipe for each seed, going on with those that were stopped; returns the runs' folders.

    With several jobs at once, one that fails ends no other: gbnzoo.jobs.FailedJobsError comes at the end.
    """
    recipes = [load_recipe(recipe, overrides, rung=rung, seed=seed) for seed in seeds for rung in rungs]
    if jobs == 1:
        return [train.train(each, data_dir=data_dir, out=out, resume=True, tracker=tracker) for each in recipes]
    if is_launched():
        raise ValueError(f"--jobs {jobs} starts processes by itself; wanted no launcher, or --jobs 1")
    shared = {"data-dir": data_dir, "out": out, "tracker": tracker}
    run_jobs(
        [
            training_job(each.run_name, recipe, overrides, {"rung": each.rung, "seed": each.seed, **shared})
            for each in recipes
        ],
        jobs,
    )
    return [out / each.run_name for each in recipes]


def _planned(
    recipe: Recipe,
    regime: Regime,
    shape: tuple[tuple[int, int, int], int] | None,
    processes: int,
    micro_batch_size: int | None,
) -> str:
    """One rung's plan as a paragraph; the shape is that of images and classes, where it is known."""
    moments = {0, regime.warmup_updates, *regime.milestones, regime.total_updates - 1}
    rates = ", ".join(f"{regime.lr_at(u):.4g} at {u:,}" for u in sorted(moments) if u < regime.total_updates)
    clip = f", gradient norm clipped at {regime.clip_grad_norm:g}" if regime.clip_grad_norm else ""
    try:
        layout, measured = tuning.layout_by_rule(regime, processes, tuning.likely_device(), micro_batch_size), ""
        if shape and micro_batch_size is None:
            layout, measured = _tuned(recipe, regime, layout, shape)
        spread = f"{layout}{measured}"
    except ValueError as error:
        spread = f"not as asked: {error}"
    return (
        f"{regime.rung.name:4} batch {regime.batch_size:,} = {regime.num_ghosts} ghost(s) of {regime.ghost_batch_size:,}\n"
        f"     {spread}\n"
        f"     {regime.total_updates:,} updates, {regime.epochs:,.1f} epochs, {regime.samples_seen:,} samples seen\n"
        f"     learning rate {rates} (update){clip}"
    )


def _print_rates(path: str, overrides: Sequence[str], recipe: Recipe, data_dir: Path | None) -> None:
    """Measured on this machine, and the command that is the fastest."""
    is_cpu = tuning.likely_device().type == "cpu"
    splits = rates.splits(torch.get_num_threads()) if is_cpu else [(1, torch.get_num_threads())]
    print(
        f"\n{recipe.rung} here, load {os.getloadavg()[0]:.1f}:\n\n| processes | threads of each | micro-batch | images/s |"
    )
    print("|---|---|---|---|")
    regime = recipe.regime(len(train.load_sets(recipe, data_dir)[0]))
    measured = []
    for processes, threads in splits:
        try:
            tuning.layout_by_rule(regime, processes, tuning.likely_device())
        except ValueError:
            continue  # so many cannot share the batch
        rate = rates.measure_rate(
            path, overrides, rung=recipe.rung, processes=processes, threads=threads, data_dir=data_dir
        )
        measured.append(rate)
        print(f"| {processes} | {threads} | {rate.micro_batch_size:,} | {rate.images_per_second:,.0f} |", flush=True)
    best = rates.fastest(measured)
    words = ["gbnzoo", "train", path, *overrides, "--rung", recipe.rung, "--processes", str(best.processes)]
    print(f"\nfastest: {shlex.join(words)}")


def _tuned(
    recipe: Recipe, regime: Regime, layout: Layout, shape: tuple[tuple[int, int, int], int]
) -> tuple[Layout, str]:
    """The layout a run would have here, as far as that was measured, and what to say about it."""
    threads = max(1, torch.get_num_threads() // layout.processes)
    setting = tuning.setting_of(recipe, layout, *shape, tuning.likely_device(), threads)
    model = setting and train.sketched_model(recipe, *shape)
    if not model or not tuning.measuring_seconds(model, setting, regime.samples_seen // layout.processes):
        return layout, ""
    seconds = tuning.kept(setting)
    if seconds is None:
        *some, last = setting.sizes
        return layout, f", or the fastest of {', '.join(map(str, some))} and {last}, measured when it starts"
    size = tuning.choose(seconds, setting.sizes, layout.micro_batch_size)
    rate = f" ({1 / seconds[size]:,.0f} images/s)" if size in seconds else ""
    return replace(layout, micro_batch_size=size), f", measured as the fastest{rate}"
