"""Every option of every command: its type, default, kind and meaning, and which combinations are refused.

`RunOptions` holds what all commands share, a subclass what one command adds or begins with. The string under a field is
its documentation and its `--help`. How recipes and flags are read into a schema stands in `options/schema.py`.

A front door calls `parse(PretrainOptions, sys.argv[1:], preset=methods.preset, term_options=...)`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from options.schema import (
    Options,
    machine,
    nearest,
    require,
    result,
    shape,
    show,
)

Run = TypeVar("Run", bound="RunOptions")

TORCHRUN = "use torchrun, which starts the processes and tells each its rank"
ENCODER = ("model", "embed_dim", "depth", "num_heads", "input_size", "in_chans", "value_range", "mean", "std")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What every training command shares."""

    PROGRAM: ClassVar[str] = ""  # the module in programs/; every checkpoint stores it

    ALIASES: ClassVar[dict[str, str]] = {
        "nor_weight": "terms.neighbor.weight",
        "lamda": "terms.neighbor.weight",
        "data_dir": "data_path",
        "img_size": "input_size",
        "b": "batch_size",
        "grad_accum_steps": "accum_iter",
        "j": "num_workers",
        "workers": "num_workers",
        "output": "output_dir",
    }  # names that users of NoR-MAE and timm know
    FOREIGN: ClassVar[dict[str, str]] = {
        "dist_url": TORCHRUN,
        "dist_on_itp": TORCHRUN,
        "world_size": TORCHRUN,
        "local_rank": TORCHRUN,
        "log_dir": "logs are written into output_dir",
        "start_epoch": "a checkpoint knows its epoch, see resume",
    }  # flags of MAE's scripts without a counterpart, and what to do instead
    INHERITS: ClassVar[tuple[str, ...]] = ()  # options that the checkpoint in `init_from` decides unless they are given
    INHERITS_EVAL: ClassVar[tuple[str, ...]] = ()  # the same for the checkpoint that `eval` evaluates

    # In these `~` is expanded.
    PATHS: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "init_from", "data_path", "dataset", "class_list")

    output_dir: str = machine("output", section="Run folder")
    """Folder of the run: options, logs, checkpoints. It must be new, or hold an earlier part of this very run."""
    resume: str = machine("auto")
    """Checkpoint to resume from; `auto` or empty: the latest one in the run's folder, if there is one."""
    overwrite: bool = machine(False)
    """Start anew in a folder that holds a run, whose files are lost."""
    allow_change: tuple[str, ...] = machine(())
    """Result options that may differ from those of the run that goes on, e.g. `epochs terms.neighbor.weight`."""
    init_from: str = result("")
    """Checkpoint of MAE, NoR-MAE, timm or ours whose weights to begin with. Not a resume: the schedule starts anew."""
    save_every: int = machine(20)
    """Epochs between checkpoints that are kept (`epoch-0020.pth`); `last.pth` is written after every epoch."""
    save_minutes: float = machine(10.0)
    """Minutes after which `last.pth` is also written within an epoch; 0 never."""
    save_steps: int = machine(0)
    """Optimizer steps after which `last.pth` is also written within an epoch; 0 never."""
    keep: int = machine(3)
    """How many of the newest `epoch-NNNN.pth` stay on the disk."""
    log_every: int = machine(20)
    """Optimizer steps between two lines of the log, the only moments that wait for the device."""

    data_path: str = machine("", section="Data")
    """Folder of images (`train/CLASS/*`, `CLASS/*`, or flat or nested without labels), or the word `digits`."""
    dataset: str = result("auto")
    """How data_path is read: `folder`, `digits`, `LIST.txt`, `torch/NAME` (a set of torchvision's), `hfds/NAME`, `wds`;
    `auto` goes by the look of data_path, which may be the word `digits`."""
    class_list: str = result("")
    """Use only these classes: a file with one class folder a line, or `imagenet100`; empty uses all."""
    label_offset: int | None = result(None)
    """Number of the first class in a list or in label files of an archive: 0 or 1. None: 0, and classifiers refuse
    labels of which none is 0."""
    input_size: tuple[int, int] = shape((224, 224))
    """Pixels of the images given to the model: one number, or rows and columns as `160x96`."""
    in_chans: int = shape(3)
    """Channels of the images."""
    value_range: tuple[float, ...] = result(())
    """Lowest and highest pixel value, e.g. `0 4095`, that become black and white in images of more than 8 bits; empty:
    decided from a sample of the training images, logged and stored. 8-bit images are not changed."""
    mean: tuple[float, ...] = result(())
    """Mean of each channel, on a scale of 0 to 1, that is subtracted; empty: ImageNet's for 3 channels, else 0.5."""
    std: tuple[float, ...] = result(())
    """Standard deviation of each channel, on that scale, to divide by; empty: ImageNet's for 3 channels, else 0.5."""
    num_workers: int = machine(4)
    """Processes that load images, for each device; 0 loads in the training process. The batches are the same."""
    pin_mem: bool = machine(True)
    """Load into page-locked memory, from where copies to a GPU are faster."""
    worker_timeout: float = machine(300.0)
    """Seconds without a batch from the loading processes after which they are started anew; 0 waits for ever."""

    total_batch_size: int = result(0, section="Batch and optimizer")
    """Images of one optimizer step over all devices; 0: batch_size x accum_iter x processes."""
    batch_size: int = machine(0)
    """Images of one forward pass on one device; 0: as total_batch_size asks, at most 256, or 64 without it."""
    accum_iter: int = machine(0)
    """Forward passes that add up to one optimizer step; 0: as total_batch_size and batch_size ask, or 1."""
    epochs: int = result(100)
    """Passes over the training images."""
    warmup_epochs: float = result(5.0)
    """Epochs over which the learning rate rises from 0; it then falls along half a cosine to min_lr."""
    blr: float = result(1e-3)
    """Learning rate for a batch of 256: the rate is blr x total_batch_size / 256. Ignored when lr is given."""
    lr: float = result(0.0)
    """Highest learning rate, whatever the batch; 0: from blr."""
    min_lr: float = result(0.0)
    """Learning rate at the end."""
    weight_decay: float = result(0.05)
    """Weight decay; biases and norms have none."""
    clip_grad: float = result(0.0)
    """Largest norm of the gradient, scaled down beyond it; 0: no limit."""
    skip_spikes: float = result(0.0)
    """Leave out an update whose gradient has more than this many times the usual norm; 0: none. Not with fp16."""
    seed: int = result(0)
    """Decides initial weights, order of images, crops, masks: two runs of one seed are the same run."""

    device: Literal["auto", "cpu", "cuda", "mps"] = machine("auto", section="Machine")
    """`auto` takes a GPU if there is one."""
    amp: Literal["auto", "bf16", "fp16", "none"] = result("auto")
    """Mixed precision; `auto`: bf16 on a GPU that has it, fp16 on another, none elsewhere."""
    compile: bool = machine(False)
    """Compile the training step: a slow start, then faster."""

    max_bad_steps: int = machine(10, section="Tolerance")
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps never change the weights."""
    max_bad_fraction: float = machine(0.01)
    """Stop when more than this share of the images cannot be read; such images are replaced and listed."""
    max_save_failures: int = machine(5)
    """Stop after this many checkpoints in a row could not be written."""

    def _check(self) -> None:
        super()._check()
        for name in self.PATHS:
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        object.__setattr__(self, "resume", self.resume or "auto")
        require((self.label_offset or 0) >= 0, f"must be at least 0, found {self.label_offset}", "label_offset")
        self._at_least(1, "in_chans", "epochs", "save_every", "keep", "log_every", "max_bad_steps", "max_save_failures")
        self._at_least(0, "save_minutes", "save_steps", "num_workers", "total_batch_size", "batch_size", "accum_iter")
        self._at_least(0, "warmup_epochs", "blr", "lr", "min_lr", "weight_decay", "clip_grad", "skip_spikes")
        self._at_least(0, "worker_timeout")
        self._between(0, 1, "max_bad_fraction")
        self._between(0, 2**32 - 1, "seed")  # what NumPy takes
        require(min(self.input_size) > 0, f"must be at least 1 pixel, found {show(self.input_size)}", "input_size")
        limits = self.value_range
        require(len(limits) in (0, 2), f"must be two numbers, LOW and HIGH, found {show(limits)}", "value_range")
        require(not limits or limits[0] < limits[1], f"the first must be less, found {show(limits)}", "value_range")
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            require(count in (0, self.in_chans), f"{count} values for in_chans {self.in_chans}", name, "in_chans")
        require(all(value > 0 for value in self.std), f"must be positive, found {show(self.std)}", "std")
        require(bool(self.lr or self.blr), "is 0, and so is blr; give one of them", "lr", "blr")
        require(not self.lr or self.min_lr <= self.lr, f"{self.min_lr:g} is more than lr {self.lr:g}", "min_lr", "lr")
        parts = [name for name in ("batch_size", "accum_iter") if getattr(self, name)]
        require(
            self.total_batch_size % math.prod(getattr(self, name) for name in parts) == 0,
            f"{self.total_batch_size} is not a multiple of "
            + " x ".join(f"{name} {getattr(self, name)}" for name in parts),
            "total_batch_size",
            *parts,
        )
        require(self.device != "cpu" or self.amp != "fp16", "fp16 is for GPUs; use bf16 or none", "amp", "device")
        require(
            self.dataset not in ("digits", "scenes") or self.data_path in ("", self.dataset),
            f"dataset {self.dataset} reads no folder, found {self.data_path!r}",
            "data_path",
            "dataset",
        )
        require(not self.overwrite or self.resume == "auto", "starts anew, resume goes on", "overwrite", "resume")
        self._check_allow_change()

    def _check_allow_change(self) -> None:
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(self) if field.name != "terms"}
        for term, options in getattr(self, "terms", {}).items():
            kinds.update({f"terms.{term}.{option}": "result" for option in options or ()})
        for name in self.allow_change:
            require(name in kinds, f"no option {name!r} here; {nearest(name, kinds)}".rstrip("; "), "allow_change")
            shapes = kinds[name] == "shape"
            require(not shapes, f"{name} shapes what a checkpoint holds: it cannot change within a run", "allow_change")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(RunOptions):
    """What every command with a vision transformer shares."""

    model: str = shape("mae_vit_tiny_patch16", section="Encoder")
    """`mae_vit_SIZE_patchP`, with SIZE one of tiny, small, base, large, huge and any patch size P in pixels."""
    embed_dim: int = shape(0)
    """Channels of the encoder; 0: the model's own, as for the two options that follow."""
    depth: int = shape(0)
    """Blocks of the encoder."""
    num_heads: int = shape(0)
    """Attention heads of the encoder."""
    grad_checkpointing: bool = machine(False)
    """Compute the blocks twice to keep fewer activations: less memory, more time."""

    min_scale: float = result(0.2, section="Crops")
    """Smallest share of an image's area that a random crop takes."""
    hflip: float = result(0.5)
    """Probability of mirroring an image left to right."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "embed_dim", "depth", "num_heads")
        self._between(0, 1, "hflip", "min_scale")
        require(self.min_scale > 0, "must be more than 0, or a crop is empty", "min_scale")


@dataclass(frozen=True, kw_only=True)
class WholeImageOptions(EncoderOptions):
    """What commands that evaluate one vector or class per image share."""

    eval_crop: Literal["keep_size", "mae"] = result("keep_size", section="Crops")
    """How images are prepared for evaluation, k-NN and features. `mae`: all are resized and their centre cropped, as by
    MAE and timm (32 -> 36 -> 32); `keep_size`: the same, but an image that already has input_size stays unchanged."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(WholeImageOptions):
    """Pretrain a vision transformer on images without labels."""

    PROGRAM = "pretrain"

    epochs: int = result(400)
    warmup_epochs: float = result(40.0)
    blr: float = result(1.5e-4)

    method: str = shape("nor_mae", section="Objective")
    """Pretraining method, e.g. `mae`, `nor_mae`, `simmim`; it decides which further options and loss terms exist."""
    terms: dict[str, dict[str, Any] | None] = result({})
    """Changes to the method's loss terms: `{neighbor: {weight: 1e-4}}`; `{label: {}}` adds one, `null` removes it."""

    region_decode: bool = result(False, section="Loading")
    """Decode only the part of a JPEG file that its crop shows (requirements/region.txt): the same pixels sooner, but
    damage outside the crop goes unnoticed."""

    data_on_device: bool = result(False, section="Small data")
    """Hold all images decoded in the device's memory and crop there (CIFAR, digits). Draws other crops and masks."""

    knn_every: int = machine(0, section="Watching")
    """Epochs between measurements of the encoder by k nearest neighbours, for data with labels; 0 never."""
    picture_every: int = machine(0)
    """Epochs between pictures of reconstructions, in `samples/` and TensorBoard; 0 never."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "knn_every", "picture_every")
        both = self.region_decode and self.data_on_device
        require(not both, "reads whole images once: no parts of them", "data_on_device", "region_decode")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(WholeImageOptions):
    """What fine-tuning and probing share: labelled images, and how the answer is measured."""

    ALIASES: ClassVar[dict[str, str]] = {
        **RunOptions.ALIASES,
        "finetune": "init_from",
        "nb_classes": "num_classes",
    }
    FOREIGN: ClassVar[dict[str, str]] = {
        **RunOptions.FOREIGN,
        "cls_token": "say --global_pool token",
        "dist_eval": "evaluation is always shared among the processes, each image counted once",
    }
    INHERITS: ClassVar[tuple[str, ...]] = ENCODER
    INHERITS_EVAL: ClassVar[tuple[str, ...]] = (*ENCODER, "global_pool", "eval_crop")

    num_classes: int = shape(0, section="Classifier")
    """Classes of the head; 0: as many as the training images have."""
    global_pool: Literal["avg", "token"] = shape("avg")
    """What the head sees of the encoder: the average of the patch tokens, or the class token."""

    label_share: float = result(1.0, section="Labels")
    """Share of each class's training images to use, at least one of each: 0.01 and 0.1 for the usual low-label runs."""
    labels_per_class: int = result(0)
    """Training images of each class to use; 0: as label_share says."""
    subset_seed: int = result(0)
    """Seed of every random split of the images (label_share, holdout, test_share), whatever `seed` is."""
    test_share: float = result(0.1)
    """Share of each class's images that is set aside for testing, where there is no split `val` or `test`; at least 20
    images, and two of each class, where a quarter of each class is so many."""
    holdout: float = result(0.02)
    """Share of each class's training images that is set aside to choose `best` on, where there are no validation images
    beside the test images; at least as many images as for test_share, unless there is a split `val`, on which it is
    chosen then. 0: it is chosen on the test images themselves, as by MAE's script, and flattered by that."""
    group_by: str = result("")
    """Never divide a group of images by a random split: `folder`, or a regular expression with one group in parentheses
    that is searched in each image's name, such as `([^/]+)_[0-9]+` for the frames of a film."""
    eval_every: int = result(1)
    """Epochs between evaluations; the last epoch has one anyway."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "num_classes", "labels_per_class")
        self._at_least(1, "eval_every")
        self._between(0, 1, "label_share", "holdout", "test_share")
        require(0 < self.test_share < 1, "must be more than 0 and less than 1", "test_share")
        self._between(0, 2**32 - 1, "subset_seed")
        require(self.num_classes != 1, "one class leaves nothing to tell apart", "num_classes")
        require(self.label_share > 0, "must be more than 0, or no image is left", "label_share")
        require(self.holdout < 1, "must be less than 1, or no image is left to train on", "holdout")
        both = self.labels_per_class > 0 and self.label_share < 1
        require(not both, "give either it or label_share", "labels_per_class", "label_share")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ClassifierOptions):
    """Train a classifier end to end, from a pretrained encoder (`--init_from`) or from scratch."""

    PROGRAM = "finetune"

    blr: float = result(5e-4)
    min_lr: float = result(1e-6)
    min_scale: float = result(0.08)

    eval: bool = machine(False, section="Fine-tuning")
    """Train nothing: print the accuracy of the checkpoint that `resume` or `init_from` names, or of the run's last."""
    from_scratch: bool = result(False)
    """Take the sizes of the encoder in `init_from` and none of its weights, for a comparison with what it learned."""
    drop_path: float = result(0.1)
    """Stochastic depth: share of the images that skip the last block; earlier blocks are skipped less."""

    optimizer: Literal["adamw", "sgd"] = shape("adamw")
    """`adamw` with (0.9, 0.999), or `sgd` with momentum 0.9."""
    layer_decay: float = result(0.65)
    """Each block learns at this times the rate of the one above it; 1: all alike."""
    steps: int = result(0)
    """Optimizer steps of the whole run, in place of epochs; 0: as epochs say."""
    ema: float = result(0.0)
    """Decay of a moving average of the weights, which is then what is evaluated; 0: none."""

    aa: str = result("rand-m9-mstd0.5-inc1", section="Augmentation")
    """timm's name of an automatic augmentation; empty: none."""
    color_jitter: float = result(0.0)
    """Strength of random brightness, contrast and saturation, where there is no `aa`."""
    reprob: float = result(0.25)
    """Probability of erasing a rectangle of the image, which is filled with noise."""
    mixup: float = result(0.8)
    """Alpha of mixup; 0: none. Where there is cutmix too, every batch has one of the two."""
    cutmix: float = result(1.0)
    """Alpha of cutmix; 0: none."""
    smoothing: float = result(0.1)
    """Share of the target that is spread over all classes."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "steps", "color_jitter", "mixup", "cutmix")
        self._between(0, 1, "drop_path", "layer_decay", "ema", "reprob", "smoothing")
        require(bool(self.init_from) or not self.from_scratch, "goes with init_from", "from_scratch", "init_from")
        for name in ("drop_path", "ema", "smoothing"):
            require(getattr(self, name) < 1, "must be less than 1", name)
        require(self.layer_decay > 0, "must be more than 0, or nothing but the head learns", "layer_decay")
        require(not (self.aa and self.color_jitter), "has no effect beside aa; leave one out", "color_jitter", "aa")
        coloured = bool(self.aa or self.color_jitter)
        require(
            not coloured or self.in_chans == 3,
            f"is for 3 channels, in_chans is {self.in_chans}: leave it empty",
            "aa",
            "in_chans",
        )

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(ClassifierOptions):
    """Judge a frozen encoder: a linear classifier on its features, and k nearest neighbours."""

    PROGRAM = "probe"

    epochs: int = result(90)
    warmup_epochs: float = result(10.0)
    blr: float = result(0.1)
    weight_decay: float = result(0.0)

    augment: bool = result(False, section="Probe")
    """Encode a new random crop of every image in every epoch, as MAE does; otherwise each image is encoded once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "must be given: the checkpoint whose encoder is evaluated", "init_from")


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(EncoderOptions):
    """Train UPerNet to tell the class of every pixel, from a pretrained encoder (`--init_from`) or from scratch."""

    PROGRAM = "segment"

    ALIASES: ClassVar[dict[str, str]] = {
        **RunOptions.ALIASES,
        "finetune": "init_from",
        "nb_classes": "num_classes",
        "cat_max_ratio": "max_class_share",
    }
    INHERITS: ClassVar[tuple[str, ...]] = tuple(name for name in ENCODER if name != "input_size")
    INHERITS_EVAL: ClassVar[tuple[str, ...]] = (
        *ENCODER,
        *("dataset", "class_list", "reduce_zero_label", "ignore_label", "mask_values"),
        *("test_share", "subset_seed", "group_by"),
        *("short_side", "window", "stride", "flip"),
    )

    data_path: str = machine("")
    """Folder with `images` and `masks` (or `annotations`), each with `train` and `val` or without; or `scenes`."""
    dataset: Literal["auto", "folder", "ade20k", "scenes"] = result("auto")
    """How data_path is read; `ade20k`: ADEChallengeData2016 with its 150 classes; `scenes`: generated, no folder."""
    class_list: str = result("")
    """File with a class's name a line, in the order of the masks' numbers; empty: `classes.txt` in data_path."""
    input_size: tuple[int, int] = shape((512, 512))
    """Pixels of a training crop and of a window of evaluation: one number, or rows and columns as `160x96`."""
    blr: float = result(1.6e-3)
    min_scale: float = result(0.5)
    """Least factor by which a training image is resized before it is cropped."""

    eval: bool = machine(False, section="Segmentation")
    """Train nothing: print the figures of the checkpoint that `resume` or `init_from` names, or of the run's last."""
    from_scratch: bool = result(False)
    """Take the sizes of the encoder in `init_from` and none of its weights, for a comparison with what it learned."""
    num_classes: int = shape(0)
    """Classes; 0, as it should be: as many as the class list has."""
    drop_path: float = result(0.1)
    """Stochastic depth: share of the images that skip the last block; earlier blocks are skipped less."""
    auxiliary: float = result(0.4)
    """Weight of the auxiliary head's loss."""
    layer_decay: float = result(0.65)
    """Each block learns at this times the rate of the one above it; 1: all alike."""
    steps: int = result(0)
    """Optimizer steps of the whole run, in place of epochs; 0: as epochs say."""
    warmup_steps: int = result(0)
    """Steps over which the learning rate rises from 0, in place of warmup_epochs; 0: as warmup_epochs says."""
    power: float = result(1.0)
    """After the warm-up the rate falls as (1 - done) to this power: 1 is a straight line."""

    reduce_zero_label: bool = result(False, section="Masks")
    """In a mask 0 is no class and 1 the first one, as in ADE20K (where it is so without saying)."""
    ignore_label: int | None = result(None)
    """Value of mask pixels that are ignored, in training and in metrics; not given: 255, and a run is refused where
    255 fills a real area while a listed class is in no mask."""
    mask_values: tuple[str, ...] = result(())
    """Value stored in the masks for each class, in the order of the class list: `0,255`, or colours as
    `#000000,#ff0000`; empty: the classes' numbers."""
    check_masks: bool = machine(True)
    """Look at every mask before training. Off: what is wrong counts among the unreadable images as it is met."""
    label_share: float = result(1.0)
    """Share of the training images to use, at least one; a smaller share is part of a larger one."""
    test_share: float = result(0.1)
    """Share of the images that is set aside to judge, where there is no folder `val` or `test`."""
    holdout: float = result(0.02)
    """Share of the training images that is set aside to choose `best` on, where there is no `val` beside `test`; 0: it
    is chosen on the test images themselves, as everyone does on ADE20K, and flattered by that."""
    subset_seed: int = result(0)
    """Seed of every random split of the images (label_share, holdout, test_share), whatever `seed` is."""
    group_by: str = result("")
    """Never divide a group of images by a random split: `folder`, or a regular expression with one group in parentheses
    that is searched in each image's name, such as `([^/]+)_[0-9]+` for the frames of a film."""

    short_side: int = result(0, section="Scaling")
    """Pixels of an image's short side when it is judged; 0: the crop's. The long side is at most four times that."""
    max_scale: float = result(2.0)
    """Largest factor by which a training image is resized; the least is min_scale."""
    max_class_share: float = result(0.75)
    """A crop of which one class fills more is drawn again, ten times at most; 1: any crop will do."""
    photometric: bool = result(True)
    """Distort brightness, contrast, saturation and hue."""

    window: Literal["slide", "whole"] = result("slide", section="Evaluation")
    """Judge images by overlapping windows of the crop's size, or whole, with positions resampled to their size."""
    stride: int = result(0)
    """Pixels between two windows; 0: two thirds of the crop."""
    flip: bool = result(False)
    """Judge by the average of an image and its mirror image."""
    eval_every: int = result(10)
    """Epochs between evaluations; the last epoch has one anyway."""
    picture_every: int = machine(10)
    """Epochs between pictures of predicted masks, in `samples/` and TensorBoard; 0 never."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "num_classes", "auxiliary", "steps", "warmup_steps", "power")
        self._at_least(0, "short_side", "stride", "picture_every")
        require(self.ignore_label is None or self.ignore_label >= 0, "must be at least 0", "ignore_label")
        mapped = bool(self.mask_values) and (self.reduce_zero_label or self.dataset == "ade20k")
        require(not mapped, "says itself which value is which class: leave out", "mask_values", "reduce_zero_label")
        require(self.label_offset is None, "is for lists; for masks see reduce_zero_label", "label_offset")
        self._at_least(1, "eval_every")
        self._between(0, 1, "drop_path", "layer_decay", "label_share", "test_share", "holdout", "max_class_share")
        self._between(0, 2**32 - 1, "subset_seed")
        require(self.num_classes != 1, "one class leaves nothing to tell apart", "num_classes")
        for name in ("drop_path", "holdout", "test_share"):
            require(getattr(self, name) < 1, "must be less than 1", name)
        require(self.label_share > 0, "must be more than 0, or no image is left", "label_share")
        require(self.test_share > 0, "must be more than 0, or no image is left to judge", "test_share")
        require(self.layer_decay > 0, "must be more than 0, or nothing but the heads learns", "layer_decay")
        require(self.max_scale >= self.min_scale, "must be at least min_scale", "max_scale", "min_scale")
        require(bool(self.init_from) or not self.from_scratch, "goes with init_from", "from_scratch", "init_from")
        most = min(self.input_size)
        require(self.stride <= most, f"{self.stride} leaves gaps between windows of {most} pixels", "stride")
        require(not self.steps or self.warmup_steps < self.steps, "must be less than steps", "warmup_steps", "steps")


def resolve_batch(options: Run, processes: int) -> Run:
    """The same options with total_batch_size, batch_size and accum_iter worked out for so many processes.

    total = batch_size x accum_iter x processes, whichever of them are given; OptionError when it cannot be.
    """
    total, batch, accum = options.total_batch_size, options.batch_size, options.accum_iter
    if not total:
        batch, accum = batch or 64, accum or 1
        total = batch * accum * processes
    share = total // processes
    if not batch and accum:
        batch = share // accum
    elif not batch:
        batch = max(size for size in range(1, 257) if share % size == 0)
    accum = accum or share // batch
    asked = [f"{name} {getattr(options, name)}" for name in ("batch_size", "accum_iter") if getattr(options, name)]
    advice = f"; each process takes {share}, which batch_size must divide" if share * processes == total else ""
    require(
        0 < total == batch * accum * processes,
        f"{total} does not divide into {' x '.join([*asked, f'{processes} processes'])}{advice}",
        *("total_batch_size", "batch_size", "accum_iter"),
    )
    return dataclasses.replace(options, total_batch_size=total, batch_size=batch, accum_iter=accum)
