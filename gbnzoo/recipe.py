"""A recipe: one YAML file with the science of a run and nothing of the machine.

Everything is checked here, once: an unknown, duplicate or mistyped key and an impossible number are errors that name file,
key, what was wanted and what would fix it.
"""

import difflib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from gbnzoo.regime import RUNGS, LrScaling, Regime, Schedule, derive_regime

RungName = Literal["sb", "lb", "lr", "gbn", "ra"]
PositiveInt = Annotated[int, Field(gt=0)]
Epochs = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Scalar = bool | int | float | str


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names file and key, and says what would fix it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _not_among_args(**owners: str) -> Any:
    """A validator that refuses, in a section's `args`, what is given elsewhere."""

    def refuse(args: dict[str, Argument]) -> dict[str, Argument]:
        for key in args.keys() & owners:
            raise ValueError(f"{key} is not given here; wanted {owners[key]}")
        return args

    return field_validator("args")(refuse)


def _argument(value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(each, Scalar) for each in value):
        value = tuple(value)
    elif not isinstance(value, Scalar):
        raise ValueError(f"given {_shown(value)}, wanted a number, a text, true, false or a list of such")
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"given {_shown(value)}, wanted finite numbers")
    return value


Argument = Annotated[Any, AfterValidator(_argument)]
"""Of somebody else's function: a number, a text, true, false, or a tuple of such."""


class Model(_Section):
    """A registered timm architecture and keyword arguments for its entry point."""

    name: str
    args: dict[str, Argument] = {}

    _args_of_others = _not_among_args(
        ghost_batch_size="large.ghost_batch_size",
        num_classes="data.num_classes, or what the data have",
        in_chans="data whose images have so many channels",
        pretrained="none of it, a run starts from random weights",
        pretrained_cfg_overlay="none of it, the data say what it holds",
    )

    @field_validator("name")
    @classmethod
    def _has_no_tag(cls, name: str) -> str:
        architecture, dot, _ = name.partition(".")
        if dot:
            raise ValueError(f"{name!r} names weights, and a run starts from random ones; wanted {architecture!r}")
        return name


class Transform(_Section):
    """How images that are read as they are needed become a batch: timm's transforms, each image by itself.

    Up to `train_interpolation` these are what `timm.data.create_transform` takes, and its own values, for training; `mixup` and
    `cutmix` are the alphas of timm's Mixup, which mixes neighbours in the global batch. `eval_image_size` (data.image_size
    where it is not given), `crop_pct` and `interpolation` are for scoring.
    """

    scale: Annotated[tuple[float, float], Field(strict=False)] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], Field(strict=False)] = (3 / 4, 4 / 3)
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    auto_augment: str | None = None
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    eval_image_size: PositiveInt | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class Data(_Section):
    """A data set by its name here, its Hub id, or `imagefolder`; see `gbnzoo.data.load_images`.

    Without `transform` all images are held in memory, and `augment` makes a whole batch of them at once; with it they are
    read from disk as they are needed (`gbnzoo.image_files`). `scored_split` is the one that models are scored on where there
    is no `holdout`: the set's own, or the test split. `random_labels` is the probability with which the label of a training
    image is replaced, once and for the whole run, by one drawn uniformly from all classes (Zhang et al. 2017, arXiv
    1611.03530); images that are scored keep theirs.
    """

    name: str
    augment: str = "none"
    transform: Transform | None = None
    holdout: Annotated[int, Field(ge=0)] = 0
    random_labels: Share = 0.0
    scored_split: Literal["test", "validation"] | None = None
    image_size: PositiveInt | None = None
    image_column: str | None = None
    label_column: str | None = None
    num_classes: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_way_to_read(self) -> "Data":
        if self.transform and self.augment != "none":
            raise ValueError(
                f"augment {self.augment} is for images in memory, transform for images on disk; give one of them"
            )
        if self.transform and not self.image_size:
            raise ValueError("transform needs image_size, the side in pixels that images are trained at")
        if self.scored_split and self.holdout:
            raise ValueError(f"scored_split {self.scored_split} and holdout {self.holdout}: give one of them")
        return self

    @property
    def in_memory(self) -> dict[str, Any]:
        """What `gbnzoo.data.load_images` takes, besides the name."""
        return self.model_dump(exclude={"name", "augment", "transform", "random_labels", "scored_split"})


class Base(_Section):
    """The small-batch regime, from which every rung is derived. Times are in epochs; `lr_decay` is one factor for all
    milestones or one for each."""

    batch_size: PositiveInt
    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    schedule: Schedule = "milestones"
    milestones: Annotated[tuple[Epochs, ...], Field(strict=False)] = ()
    lr_decay: float | Annotated[tuple[float, ...], Field(strict=False)] = 0.1
    warmup_epochs: Epochs = 0
    weight_decay_epochs: Epochs | None = None

    @model_validator(mode="after")
    def _milestones_fit(self) -> "Base":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} must rise")
        if self.milestones and self.schedule != "milestones":
            raise ValueError(f"milestones belong to schedule: milestones, not to {self.schedule}")
        if isinstance(self.lr_decay, tuple) and len(self.lr_decay) != len(self.milestones):
            raise ValueError(f"lr_decay has {len(self.lr_decay)} factors for {len(self.milestones)} milestones")
        factors = self.lr_decay if isinstance(self.lr_decay, tuple) else (self.lr_decay,)
        if not all(factor > 0 for factor in factors):
            raise ValueError(f"lr_decay: given {', '.join(f'{factor:g}' for factor in factors)}, wanted greater than 0")
        if self.milestones and self.milestones[-1] > self.epochs:
            raise ValueError(
                f"milestones {list(self.milestones)} go beyond epochs {self.epochs:g}; wanted none above it, such as"
                " base.milestones=[]"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is longer than epochs {self.epochs}")
        return self

    @property
    def decays(self) -> tuple[float, ...]:
        return self.lr_decay if isinstance(self.lr_decay, tuple) else (self.lr_decay,) * len(self.milestones)


class Optimizer(_Section):
    """One of timm's optimizers. `sgd` is the paper's, without Nesterov's momentum unless `nesterov: true`.

    `clip_grad_norm` acts from rung `lr` on, as in the paper's table. `decay_norm_and_bias: false` keeps weight decay off
    every one-dimensional parameter. `reset_momentum_each_epoch` sets what momentum has gathered back to zero as each pass over
    the data begins, as the authors' code does for F1, the ResNets and the wide ones, by making SGD anew.
    """

    name: str = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    reset_momentum_each_epoch: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_norm_and_bias: bool = True
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    args: dict[str, Argument] = {}

    _args_of_others = _not_among_args(
        lr="base.lr",
        weight_decay="optimizer.weight_decay",
        momentum="optimizer.momentum",
        nesterov="optimizer.nesterov",
        filter_bias_and_bn="optimizer.decay_norm_and_bias",
    )

    @model_validator(mode="after")
    def _resets_what_is_there(self) -> "Optimizer":
        if self.reset_momentum_each_epoch and self.name != "sgd":
            raise ValueError(f"reset_momentum_each_epoch: given with {self.name}; wanted name: sgd, or without it")
        return self


class Large(_Section):
    """What the large-batch rungs use.

    `lr_reference_batch_size` is the batch that `lr_scaling` takes `base.lr` to be for, where it is not base.batch_size.
    """

    batch_size: PositiveInt
    ghost_batch_size: PositiveInt
    lr_scaling: LrScaling = "sqrt"
    lr_reference_batch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _whole_ghosts(self) -> "Large":
        if self.batch_size % self.ghost_batch_size:
            down = self.batch_size - self.batch_size % self.ghost_batch_size
            fits = " or ".join(str(size) for size in (down, down + self.ghost_batch_size) if size)
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of ghost_batch_size {self.ghost_batch_size}; {fits} would be"
            )
        return self


class GradientNoise(_Section):
    """Noise on the gradient, from rung `lr` on: it belongs to what the paper does for large batches, as clipping does.

    `multiplicative` takes each sample's gradient times z ~ N(1, sigma²) (Hoffer et al. 2017, section 4). `isotropic` adds
    N(0, sigma²) to every coordinate of the whole batch's gradient after clipping, so that the noise has a norm of about
    sigma · sqrt(parameters) whatever the gradient has (Ge et al. 2015, arXiv 1503.02101, whose noise is of norm 1).
    """

    kind: Literal["multiplicative", "isotropic"]
    sigma: Annotated[float, Field(gt=0)]


class BinaryCrossEntropy(_Section):
    """The mean over classes of binary cross-entropies; shares of a class above `threshold` then count as 1, the others as 0."""

    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None


class Recipe(_Section):
    """The science of a run. `rung` picks how much of the paper applies; `seed` fixes everything random.

    `statistics: recalibrated` ends the run by putting in place of BatchNorm's running averages the exact mean over the
    ghosts of its first epoch (precise BN); see `gbnzoo.norm.recalibrate`. The loss is cross-entropy, unless there is `bce`.
    """

    model: Model
    data: Data
    base: Base
    optimizer: Optimizer = Optimizer()
    large: Large
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bce: BinaryCrossEntropy | None = None
    gradient_noise: GradientNoise | None = None
    evaluations: PositiveInt = 20
    statistics: Literal["running averages", "recalibrated"] = "running averages"
    tag: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] | None = None
    rung: RungName = "ra"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"

    _path: str = PrivateAttr("recipe")

    @model_validator(mode="after")
    def _large_is_larger(self) -> "Recipe":
        if self.large.batch_size < self.base.batch_size:
            raise ValueError(
                f"large.batch_size {self.large.batch_size} is smaller than base.batch_size {self.base.batch_size}; wanted a"
                " larger one, or a smaller base.batch_size"
            )
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were read."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def error(self, problem: object) -> RecipeError:
        """What to raise where something that was read turns out wrong later: it names the file too."""
        return RecipeError(f"{self._path}: {problem}")

    @property
    def name(self) -> str:
        """`architecture.tag`, as timm writes it: hub folder, Hub repo and CSV key, e.g. `resnet44_gbn.cifar10_ra4096`."""
        data = self.tag or self.data.name.split("/")[-1].lower().replace("-", "_")
        batch = self.large.batch_size if RUNGS[self.rung].is_large else self.base.batch_size
        return f"{self.model.name}.{data}_{self.rung}{batch}"

    @property
    def run_name(self) -> str:
        return f"{self.name}-seed{self.seed}"

    def regime(self, num_samples: int) -> Regime:
        """The regime of the recipe's rung on a training set of `num_samples`.

        Raises:
            RecipeError: if no update would be made.
        """
        try:
            return self._derived_regime(num_samples)
        except ValueError as error:
            raise self.error(f"base.epochs: {error}") from None

    def _derived_regime(self, num_samples: int) -> Regime:
        return derive_regime(
            self.rung,
            num_samples=num_samples,
            batch_size=self.base.batch_size,
            epochs=self.base.epochs,
            lr=self.base.lr,
            large_batch_size=self.large.batch_size,
            ghost_batch_size=self.large.ghost_batch_size,
            lr_scaling=self.large.lr_scaling,
            lr_reference_batch_size=self.large.lr_reference_batch_size,
            schedule=self.base.schedule,
            milestones=self.base.milestones,
            lr_decay=self.base.decays,
            warmup_epochs=self.base.warmup_epochs,
            weight_decay_epochs=self.base.weight_decay_epochs,
            clip_grad_norm=self.optimizer.clip_grad_norm,
            gradient_noise_sigma=self.gradient_noise.sigma if self.gradient_noise else 0.0,
        )

    def to_yaml(self) -> str:
        """Every key with its value, defaults included: what a run records of itself."""
        text = io.StringIO()
        yaml = YAML()
        yaml.default_flow_style = None
        yaml.width = 120
        yaml.dump(self.model_dump(mode="json", exclude_none=True), text)
        return text.getvalue()


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **settings: Any) -> Recipe:
    """Read and check one recipe.

    Args:
        path: YAML file; one that does not exist is also looked for among the recipes that ship with the package, under the
            same path (`recipes/mnist/mlp5_gbn.yaml`).
        overrides: `key=value` pairs with dotted keys and YAML values, e.g. `large.batch_size=2048`.
        settings: top-level keys to set (`rung`, `seed`); None leaves the file's value.

    Raises:
        RecipeError: if the file is missing or anything in it is wrong.
    """
    path = find_recipe(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; wanted the file saved as UTF-8 text") from None
    content = _parse(text, str(path))
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path}: wanted keys and values (model:, data:, base:, large:), found {_shown(content)}")
    for override in overrides:
        _apply(content, override)
    content |= {key: value for key, value in settings.items() if value is not None}
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    recipe._path = str(path)
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file itself, or the shipped recipe of that path.

    Raises:
        RecipeError: naming recipes of the same file name, or all there are.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    wanted = path.as_posix().removeprefix("recipes/")
    if wanted in shipped:
        return shipped[wanted]
    alike = (
        [name for name in shipped if Path(name).stem == path.stem]
        or difflib.get_close_matches(wanted, shipped)
        or list(shipped)
    )
    raise RecipeError(
        f"{path}: no such file; recipes that ship with gbnzoo: {', '.join(f'recipes/{name}' for name in alike)}"
    )


def recipes_folder() -> Path:
    """Where the recipes of this installation are: the subpackage gbnzoo.recipes, in a checkout beside the package."""
    package = Path(__file__).parent
    return next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this installation, `mnist/mlp5_gbn.yaml` → file."""
    folder = recipes_folder()
    files = sorted(f for f in folder.glob("*/*.yaml") if f.parent.name != "machines")
    return {f.relative_to(folder).as_posix(): f for f in files}


def _parse(text: str, source: str) -> Any:
    # ruamel.yaml reads YAML 1.2: it refuses duplicate keys and reads 1e-4 as a number; PyYAML does neither.
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: {error.problem}; a key may stand only once, and its value in YAML") from None
    except YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None


def _apply(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: wanted key=value with a dotted key, such as large.batch_size=2048")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"override {override!r}: {section} is a value and has no keys below it")
    content[last] = _parse(value, f"override {override!r}")


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location) or "recipe"
        match problem["type"]:
            case "extra_forbidden":
                known = _known_keys(location[:-1])
                close = difflib.get_close_matches(location[-1], known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
                yield f"{key} is not a key of a recipe; {hint}"
            case "missing":
                yield f"{key} is missing; it must be given"
            case "value_error":
                yield f"{key}: {problem['ctx']['error']}" if location else str(problem["ctx"]["error"])
            case "model_type":
                yield f"{key}: given {_shown(problem['input'])}, wanted a section with keys {', '.join(_known_keys(location))}"
            case _:
                wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
                wanted = "list" if problem["type"] == "tuple_type" else wanted
                yield f"{key}: given {_shown(problem['input'])}, wanted {wanted}"


def _known_keys(section: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for name in section:
        annotation = model.model_fields[name].annotation
        model = next(
            m
            for m in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(m, type) and issubclass(m, BaseModel)
        )
    return list(model.model_fields)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, Scalar | None) else f"{type(value).__name__} {value}"
