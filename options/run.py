"""Options of the training programs: type, default, kind and meaning of each, and which combinations are refused.

`RunOptions` holds what all programs share; subclasses add the options of one program or change a default. The string
under a field is its documentation and its `--help`. `options/schema.py` parses recipes and flags into these classes.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from options.schema import (
    OptionError,
    Options,
    machine,
    nearest,
    require,
    result,
    shape,
    show,
)

Run = TypeVar("Run", bound="RunOptions")

SIZES = ("tiny", "small", "base", "large", "huge")
DEVICES = r"auto|cpu|mps|cuda(:\d+)?"
TORCHRUN = "use torchrun, which starts the processes and sets the rank of each"
EncoderFormat = Literal["timm", "hf", "onnx"]
SUBMITIT = "it is an option of MAE's submitit scripts: under Slurm use scripts/slurm.sh"
ENCODER = (
    *("model", "embed_dim", "depth", "num_heads", "patch_stem"),
    *("input_size", "in_chans", "value_range", "mean", "std"),
)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options of every training program."""

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
        "learning_rate": "lr",
        "wd": "weight_decay",
        "torchcompile": "compile",
        "checkpoint_hist": "keep",
    }  # names that users of NoR-MAE and timm know
    FOREIGN: ClassVar[dict[str, str]] = {
        "dist_url": TORCHRUN,
        "dist_on_itp": TORCHRUN,
        "world_size": TORCHRUN,
        "local_rank": TORCHRUN,
        "log_dir": "logs are written into output_dir",
        "start_epoch": "a checkpoint knows its epoch, see resume",
        "nproc_per_node": "it is an option of torchrun: torchrun --nproc_per_node N SCRIPT.py ...",
        "sched": "the schedule is always a linear warm-up and half a cosine, see warmup_epochs and min_lr",
        "pretrained": "nothing is downloaded; init_from names a file of weights",
        "opt": "AdamW is used; main_finetune.py has optimizer",
        "per_device_train_batch_size": "use batch_size",
        "amp_dtype": "use amp, e.g. --amp bf16",
        "job_dir": SUBMITIT,
        "nodes": SUBMITIT,
        "ngpus": SUBMITIT,
        "partition": SUBMITIT,
        "use_volta32": SUBMITIT,
    }  # flags of MAE's scripts without a counterpart, and what to do instead
    INHERITS: ClassVar[tuple[str, ...]] = ()  # options that the checkpoint in `init_from` decides unless they are given
    INHERITS_EVAL: ClassVar[tuple[str, ...]] = ()  # the same for the checkpoint that `eval` evaluates

    COMMON: ClassVar[dict[str, tuple[str, ...]]] = {
        "Data": ("data_path", "dataset", "input_size", "in_chans", "num_classes", "label_share", "labels_per_class"),
        "Model": (
            *("method", "model", "mask_ratio", "norm_pix_loss", "terms", "terms.neighbor.weight"),
            *("init_from", "from_scratch", "global_pool"),
        ),
        "Training": (
            *("epochs", "warmup_epochs", "total_batch_size", "batch_size", "blr", "lr", "layer_decay", "weight_decay"),
            *("augment", "aa", "mixup", "cutmix", "seed"),
        ),
        "Run": ("output_dir", "resume", "overwrite", "eval", "eval_every", "knn_every", "picture_every"),
        "Machine": ("device", "amp", "compile", "num_workers"),
    }  # the groups of `--help`; a program shows those that it has

    # `~` is expanded in these options.
    PATHS: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "init_from", "data_path", "dataset", "class_list")

    output_dir: str = machine("", section="Run folder")
    """Run folder for options, logs and checkpoints. It must be new, or contain this run, which is then resumed. Empty:
    `output/NAME-DATE` with the method's or the program's name."""
    resume: str = machine("auto")
    """Checkpoint to resume from; `auto` or empty: the latest valid one in output_dir, if there is any."""
    overwrite: bool = machine(False)
    """Start from scratch in a folder that contains a run; its files are deleted."""
    allow_change: tuple[str, ...] = machine(())
    """Result options that may differ from those of the resumed run, e.g. `epochs terms.neighbor.weight`."""
    init_from: str = result("")
    """Checkpoint (MAE, NoR-MAE, timm or ours) to initialise the weights from. The schedule starts from step 0."""
    save_every: int = machine(20)
    """Epochs between checkpoints that are kept (`epoch-0020.pth`); `last.pth` is written after every epoch."""
    save_minutes: float = machine(10.0)
    """Minutes after which `last.pth` is also written within an epoch; 0: never."""
    save_steps: int = machine(0)
    """Optimizer steps after which `last.pth` is also written within an epoch; 0: never."""
    keep: int = machine(3)
    """Number of the latest `epoch-NNNN.pth` files to keep."""
    log_every: int = machine(20)
    """Optimizer steps between log lines. The device is synchronised only then."""
    wandb: str = machine("")
    """Project of Weights & Biases, `PROJECT` or `ENTITY/PROJECT`, that gets the same curves and pictures as TensorBoard
    (requirements/wandb.txt). Empty: none. WANDB_MODE=offline logs to the run folder."""

    data_path: str = machine("", section="Data")
    """Folder of images (`train/CLASS/*`, `CLASS/*`, or flat or nested without labels), a list (`.txt`), a `.tar`
    archive, a pack, or the word `digits`."""
    dataset: str = result("auto")
    """How data_path is read: `folder`, `digits`, `LIST.txt`, `torch/NAME` (a set of torchvision's), `hfds/NAME`, `wds`;
    `auto` depends on data_path, which may also be the word `digits`."""
    class_list: str = result("")
    """Use only these classes: a file with one class folder per line, or `imagenet100`; empty uses all."""
    label_offset: int | None = result(None)
    """Index of the first class in a list or in label files of an archive: 0 or 1; none: 0, and classifiers refuse
    labels that do not contain 0."""
    input_size: tuple[int, int] = shape((224, 224))
    """Pixels of the images given to the model: one number, or rows and columns as `160x96`."""
    in_chans: int = shape(3)
    """Channels of the images."""
    value_range: tuple[float, ...] = result(())
    """Lowest and highest pixel value, e.g. `0 4095`, that become black and white in images of more than 8 bits; empty:
    decided from a sample of the training images, logged and stored. 8-bit images are not changed."""
    mean: tuple[float, ...] = result(())
    """Mean of each channel to subtract, on a scale of 0 to 1; empty: ImageNet's for 3 channels, otherwise 0.5."""
    std: tuple[float, ...] = result(())
    """Standard deviation of each channel, on that scale, to divide by; empty: as for mean."""
    num_workers: int = machine(4)
    """Loader processes per device; 0 loads in the training process. The batches do not depend on it."""
    pin_mem: bool = machine(True)
    """Load batches into page-locked memory, for faster copies to a GPU."""
    worker_timeout: float = machine(300.0)
    """Seconds without a batch after which the loader processes are restarted; 0: no limit."""

    total_batch_size: int = result(0, section="Batch and optimizer")
    """Images per optimizer step over all devices; 0: batch_size x accum_iter x processes."""
    batch_size: int = machine(0)
    """Images per forward pass and device; 0: derived from total_batch_size, at most 256; 64 if that is 0 too."""
    accum_iter: int = machine(0)
    """Forward passes per optimizer step; 0: derived from total_batch_size and batch_size, or 1."""
    epochs: int = result(100)
    """Passes over the training images."""
    warmup_epochs: float = result(5.0)
    """Epochs in which the learning rate rises linearly from 0; it then follows half a cosine to min_lr."""
    blr: float = result(1e-3)
    """Base learning rate: the rate is blr x total_batch_size / 256. Ignored if lr is given."""
    lr: float = result(0.0)
    """Peak learning rate, independent of the batch size; 0: derived from blr."""
    min_lr: float = result(0.0)
    """Learning rate at the end."""
    weight_decay: float = result(0.05)
    """Weight decay; not applied to biases and norms, except in `moco_v3`."""
    clip_grad: float = result(0.0)
    """Maximum norm of the gradient, to which larger ones are scaled down; 0: no limit."""
    skip_spikes: float = result(0.0)
    """Skip updates whose gradient norm is more than this many times the usual one; 0: never. Not with fp16."""
    seed: int = result(0)
    """Seed of initial weights, image order, crops and masks: two runs with the same seed are identical."""

    device: str = machine("auto", section="Machine")
    """Device to train on: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` for the GPU of that number, `mps`."""
    amp: Literal["auto", "bf16", "fp16", "none"] = result("auto")
    """Mixed precision; `auto`: bf16 on GPUs that support it, fp16 on others, none elsewhere."""
    compile: bool = machine(False)
    """Compile the training step: slower start, faster steps."""

    max_bad_steps: int = machine(10, section="Tolerance")
    """Stop after this many consecutive steps whose loss or gradient is not finite. Such steps do not change weights."""
    max_bad_fraction: float = machine(0.01)
    """Stop if more than this share of the images cannot be read. Such images are replaced and listed."""
    max_save_failures: int = machine(5)
    """Stop after this many consecutive failures to write a checkpoint."""

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
        named = re.fullmatch(r"|([^/\\#?%:\s]+/)?[^/\\#?%:]+", self.wandb)
        require(named is not None, f"expected PROJECT or ENTITY/PROJECT, found {self.wandb!r}", "wandb")
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
            + " x ".join(f"{name} {getattr(self, name)}" for name in parts)
            + ": batch_size counts the images of one pass on one device, total_batch_size those of an optimizer step; "
            "give both, or total_batch_size alone",
            "total_batch_size",
            *parts,
        )
        known = re.fullmatch(DEVICES, self.device)
        require(known is not None, f"expected auto, cpu, cuda, cuda:N or mps, found {self.device!r}", "device")
        require(self.device != "cpu" or self.amp != "fp16", "fp16 is for GPUs; use bf16 or none", "amp", "device")
        require(
            self.dataset not in ("digits", "scenes") or self.data_path in ("", self.dataset),
            f"dataset {self.dataset} reads no folder, found {self.data_path!r}",
            "data_path",
            "dataset",
        )
        require(
            not self.overwrite or self.resume == "auto",
            "starts from scratch, and resume continues a run: give one of them",
            "overwrite",
            "resume",
        )
        self._check_allow_change()

    def _check_allow_change(self) -> None:
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(self) if field.name != "terms"}
        for term, options in getattr(self, "terms", {}).items():
            kinds.update({f"terms.{term}.{option}": "result" for option in options or ()})
        for name in self.allow_change:
            require(name in kinds, f"no option {name!r} here; {nearest(name, kinds)}".rstrip("; "), "allow_change")
            shapes = kinds[name] == "shape"
            require(
                not shapes,
                f"{name} decides which tensors a checkpoint holds and cannot change within a run",
                "allow_change",
            )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(RunOptions):
    """Options of every program with a vision transformer."""

    model: str = shape("mae_vit_tiny_patch16", section="Encoder")
    """`mae_vit_SIZE_patchP`, with SIZE one of tiny, small, base, large, huge, and any patch size P in pixels. MAE's
    names `vit_base_patch16` and `mae_vit_base_patch16_dec512d8b` are accepted too."""
    embed_dim: int = shape(0)
    """Channels of the encoder; 0: the default of the model's size, as for the next two options."""
    depth: int = shape(0)
    """Blocks of the encoder."""
    num_heads: int = shape(0)
    """Attention heads of the encoder."""
    patch_stem: Literal["linear", "conv"] = shape("linear")
    """Layers that embed a patch: `linear`, or `conv`, three convolutions that read no pixels of other patches."""
    grad_checkpointing: bool = machine(False)
    """Recompute activations in the backward pass: less memory, more time."""

    hflip: float = result(0.5, section="Crops")
    """Probability of a horizontal flip."""

    def _check(self) -> None:
        super()._check()
        match = re.fullmatch(rf"(?:mae_)?vit_({'|'.join(SIZES)})_patch([1-9]\d*)(?:_dec512d8b)?", self.model)
        if match is None:
            hint = nearest(self.model, (f"mae_vit_{size}_patch{side}" for size in SIZES for side in (16, 8, 14, 4)))
            names = f"a model is mae_vit_SIZE_patchP with SIZE one of {', '.join(SIZES)} and P in pixels"
            raise OptionError(f"model: unknown model {self.model!r}; {hint or names}", "model")
        object.__setattr__(self, "model", f"mae_vit_{match[1]}_patch{match[2]}")
        self._at_least(0, "embed_dim", "depth", "num_heads")
        self._between(0, 1, "hflip")
        require(
            self.patch_stem == "linear" or not {"timm", "hf"} & set(getattr(self, "export", ())),
            "timm and transformers have no convolutional patch stem: use onnx",
            "export",
            "patch_stem",
        )


@dataclass(frozen=True, kw_only=True)
class WholeImageOptions(EncoderOptions):
    """Options of programs that evaluate one vector or class per image."""

    min_scale: float = result(0.2, section="Crops")
    """Minimum area of a random crop, as a share of the image."""
    eval_crop: Literal["keep_size", "mae"] = result("keep_size")
    """How images are prepared for evaluation, k-NN and features. `mae`: all are resized and their centre cropped, as by
    MAE and timm (32 -> 36 -> 32); `keep_size`: the same, but an image that already has input_size stays unchanged."""

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "min_scale")
        require(self.min_scale > 0, "must be more than 0, or a crop is empty", "min_scale")


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
    """Decode only the cropped part of JPEG files (requirements/region.txt): faster, the same pixels, but damage outside
    the crop is not detected."""

    data_on_device: bool = result(False, section="Small data")
    """Keep all images decoded in device memory and crop there (small sets). Crops and masks are drawn differently."""

    export: tuple[EncoderFormat, ...] = machine((), section="Export")
    """Formats (`timm`, `hf`, `onnx`) in which the encoder is exported to `export/` when the run is finished."""

    knn_every: int = machine(0, section="Monitoring")
    """Epochs between kNN evaluations of the encoder, for data with labels; 0: never."""
    picture_every: int = machine(0)
    """Epochs between pictures of reconstructions, in `samples/` and TensorBoard; 0: never."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "knn_every", "picture_every")
        both = self.region_decode and self.data_on_device
        require(not both, "decodes complete images once, so parts cannot be decoded", "data_on_device", "region_decode")


@dataclass(frozen=True, kw_only=True)
class LabelledOptions(EncoderOptions):
    """Options of the programs that learn from labels: classes, splits and evaluation."""

    ALIASES: ClassVar[dict[str, str]] = {
        **RunOptions.ALIASES,
        "finetune": "init_from",
        "nb_classes": "num_classes",
        "class_weight": "class_weights",
    }

    num_classes: int = shape(0, section="Classes")
    """Number of classes; 0: as many as the training data have."""
    class_weights: tuple[str, ...] = result(())
    """Weight of each class in the loss, `1 5`, in the order of the classes; `balanced`: N / (K x N_k) for class k, with
    N the images (in segmentation: pixels) of the training data, N_k those of the class, and K the number of classes;
    empty: all equal."""

    label_share: float = result(1.0, section="Labels")
    """Share of the training images to use, of each class at least one; usual low-label values are 0.01 and 0.1."""
    test_share: float = result(0.1)
    """Share of the images that is held out for testing, where there is no split `val` or `test`. For
    classification at least 20 images and two per class, unless that is more than a quarter of a class."""
    holdout: float = result(0.02)
    """Share of the training images that is held out to select `best`, where there is no validation set beside the test
    set; for classification at least as many as for test_share. 0: `best` is selected on the test images, as by MAE's
    script and as is usual on ADE20K, which is optimistic."""
    subset_seed: int = result(0)
    """Seed of all random splits of the images (label_share, holdout, test_share), independent of `seed`."""
    group_by: str = result("")
    """Keep groups of images together in random splits: `folder`, or a regular expression with one group in parentheses
    that is searched in each image's name, such as `([^/]+)_[0-9]+` for the frames of a film."""
    eval_every: int = result(1)
    """Epochs between evaluations; the last epoch is always evaluated."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "num_classes")
        self._at_least(1, "eval_every")
        self._between(0, 1, "label_share", "test_share", "holdout")
        self._between(0, 2**32 - 1, "subset_seed")
        _check_class_weights(self.class_weights)
        require(self.num_classes != 1, "must be at least 2", "num_classes")
        require(self.label_share > 0, "must be more than 0, or no image is left", "label_share")
        require(0 < self.test_share < 1, "must be more than 0 and less than 1", "test_share")
        require(self.holdout < 1, "must be less than 1, or no image is left to train on", "holdout")


@dataclass(frozen=True, kw_only=True)
class TransferOptions(LabelledOptions):
    """Options of the programs that train an encoder and what reads it, end to end."""

    eval: bool = machine(False, section="Transfer")
    """Only evaluate: print the metrics of the checkpoint given by `resume` or `init_from`, or of the run's last one."""
    from_scratch: bool = result(False)
    """Use the sizes of the encoder in `init_from` but none of its weights, as a baseline."""
    drop_path: float = result(0.1)
    """Stochastic depth: rate at which the last block is skipped; it decreases linearly towards the first block."""
    layer_decay: float = result(0.65)
    """Factor between the learning rates of a block and the block above it; 1: the same rate for all."""
    steps: int = result(0)
    """Total optimizer steps, instead of epochs; 0: as given by epochs."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "steps")
        self._between(0, 1, "layer_decay")
        self._below_one("drop_path")
        require(self.layer_decay > 0, "must be more than 0, or only the head is trained", "layer_decay")
        require(bool(self.init_from) or not self.from_scratch, "needs init_from", "from_scratch", "init_from")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(LabelledOptions, WholeImageOptions):
    """Options shared by fine-tuning and linear probes."""

    FOREIGN: ClassVar[dict[str, str]] = {
        **RunOptions.FOREIGN,
        "cls_token": "use --global_pool token",
        "dist_eval": "evaluation is always distributed over the processes, each image counted once",
    }
    INHERITS: ClassVar[tuple[str, ...]] = ENCODER
    INHERITS_EVAL: ClassVar[tuple[str, ...]] = (
        *(*ENCODER, "global_pool", "eval_crop"),
        *("test_share", "subset_seed", "group_by", "label_offset"),  # or training images might be evaluated
    )

    global_pool: Literal["avg", "token"] = shape("avg", section="Classifier")
    """Input of the head: the average of the patch tokens, or the class token."""
    labels_per_class: int = result(0)
    """Training images of each class to use; 0: as given by label_share."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "labels_per_class")
        both = self.labels_per_class > 0 and self.label_share < 1
        require(not both, "give either labels_per_class or label_share", "labels_per_class", "label_share")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TransferOptions, ClassifierOptions):
    """Train a classifier end to end, from a pretrained encoder (`--init_from`) or from scratch."""

    PROGRAM = "finetune"
    ALIASES: ClassVar[dict[str, str]] = {**ClassifierOptions.ALIASES, "opt": "optimizer"}
    FOREIGN: ClassVar[dict[str, str]] = {
        name: advice for name, advice in ClassifierOptions.FOREIGN.items() if name != "opt"
    }

    INHERITS_EVAL: ClassVar[tuple[str, ...]] = (*ClassifierOptions.INHERITS_EVAL, "distill_token")

    blr: float = result(5e-4)
    min_lr: float = result(1e-6)
    min_scale: float = result(0.08)

    optimizer: Literal["adamw", "sgd"] = shape("adamw", section="Fine-tuning")
    """`adamw` with betas 0.9 and 0.999, or `sgd` with momentum 0.9."""
    ema: float = result(0.0)
    """Decay of an exponential moving average of the weights, which is then evaluated; 0: none."""

    distill_from: str = result("", section="Distillation")
    """Checkpoint of a trained classifier of the same classes, whose predictions are learned beside the labels: one of
    main_finetune.py, or a plain ViT's with a head (MAE, timm)."""
    distill_heads: int = result(0)
    """Attention heads of the teacher; 0: from its checkpoint, or the usual number for its channels; 192 channels have
    12 in this family and 3 in DeiT and timm, so it must be given."""
    distill_weight: float = result(0.5)
    """Weight of the teacher's predictions in the loss; the labels have 1 minus that."""
    distill_labels: Literal["soft", "hard"] = result("soft")
    """`soft`: the teacher's probabilities; `hard`: the class that it predicts, as in DeiT."""
    distill_token: bool = shape(False)
    """Learn the teacher's predictions with a token and a head of their own, as in DeiT; evaluation uses the mean of
    both heads. Needs global_pool token."""
    distill_temperature: float = result(1.0)
    """Temperature of both softmaxes, with soft labels."""
    distill_digest: str = result("")
    """SHA-256 of the teacher's weights, recorded by a run so that it is not resumed with another teacher."""

    export: tuple[EncoderFormat, ...] = machine((), section="Export")
    """Formats (`timm`, `hf`, `onnx`) in which the classifier of the last epoch is exported to `export/` when the run is
    finished."""

    aa: str = result("rand-m9-mstd0.5-inc1", section="Augmentation")
    """Automatic augmentation, in timm's notation; empty: none."""
    color_jitter: float = result(0.0)
    """Strength of random brightness, contrast and saturation changes, without `aa`."""
    reprob: float = result(0.25)
    """Probability of replacing a random rectangle of an image by noise."""
    mixup: float = result(0.8)
    """Alpha of mixup; 0: none. With cutmix as well, each batch uses one of the two."""
    cutmix: float = result(1.0)
    """Alpha of cutmix; 0: none."""
    smoothing: float = result(0.1)
    """Label smoothing."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "color_jitter", "mixup", "cutmix", "distill_heads")
        self._between(0, 1, "distill_weight")
        require(self.distill_temperature > 0, "must be more than 0", "distill_temperature")
        self._between(0, 1, "reprob")
        self._below_one("ema", "smoothing")
        require(
            not (self.aa and self.color_jitter),
            "has no effect together with aa; give one of them",
            "color_jitter",
            "aa",
        )
        if self.distill_token:
            taught, pooled = bool(self.distill_from) or self.eval, self.global_pool == "avg"
            require(taught, "learns from a teacher: give distill_from", "distill_token", "distill_from")
            require(not pooled, "is a second class token: use global_pool token", "distill_token", "global_pool")
            require("hf" not in self.export, "hf has no distillation token: use timm", "export", "distill_token")
        require(
            "hf" not in self.export or self.global_pool == "token",
            "hf has no classifier with average pooling: use timm, which transformers loads too, or global_pool token",
            "export",
            "global_pool",
        )
        coloured = bool(self.aa or self.color_jitter)
        require(
            not coloured or self.in_chans == 3 or self.eval,
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
    """Evaluate a frozen encoder with a linear classifier and with k nearest neighbours."""

    PROGRAM = "probe"
    FOREIGN: ClassVar[dict[str, str]] = {**ClassifierOptions.FOREIGN, "opt": "LARS is used"}

    epochs: int = result(90)
    warmup_epochs: float = result(10.0)
    blr: float = result(0.1)
    weight_decay: float = result(0.0)

    augment: bool = result(False, section="Probe")
    """Encode a new random crop of every image in every epoch, as in MAE; otherwise each image is encoded once."""
    encoder_digest: str = result("")
    """SHA-256 of the encoder's weights, recorded by a run so that it is not resumed with another encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "must be given: the checkpoint whose encoder is evaluated", "init_from")


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(TransferOptions):
    """Train UPerNet to classify every pixel, from a pretrained encoder (`--init_from`) or from scratch."""

    PROGRAM = "segment"

    ALIASES: ClassVar[dict[str, str]] = {
        **LabelledOptions.ALIASES,
        "cat_max_ratio": "max_class_share",
        "min_scale": "min_resize",
        "max_scale": "max_resize",
    }
    FOREIGN: ClassVar[dict[str, str]] = {
        **RunOptions.FOREIGN,
        "sched": "the schedule is a linear warm-up and polynomial decay, see power",
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
    """File with one class name per line, in the order of the indices in masks; empty: `classes.txt` in data_path."""
    input_size: tuple[int, int] = shape((512, 512))
    """Size of training crops and of evaluation windows in pixels: one number, or rows and columns as `160x96`."""
    warmup_epochs: float = result(5.0)
    """Epochs in which the learning rate rises linearly from 0; it then decays polynomially to min_lr (see power)."""
    blr: float = result(1.6e-3)
    eval_every: int = result(10)

    auxiliary: float = result(0.4, section="Segmentation")
    """Weight of the auxiliary head's loss."""
    warmup_steps: int = result(0)
    """Steps in which the learning rate rises from 0, instead of warmup_epochs; 0: as given by warmup_epochs."""
    power: float = result(1.0)
    """Exponent of the polynomial decay of the learning rate after the warm-up; 1: linear."""

    reduce_zero_label: bool = result(False, section="Masks")
    """Ignore 0 in masks, so that 1 is the first class, as in ADE20K (for which this is the default)."""
    ignore_label: int | None = result(None)
    """Value of mask pixels that are ignored, in training and in metrics; not given: 255, and a run is refused where
    255 fills a real area while a listed class is in no mask."""
    mask_values: tuple[str, ...] = result(())
    """Value stored in the masks for each class, in the order of the class list: `0,255`, or colours as
    `#000000,#ff0000`; empty: the classes' numbers."""
    check_masks: bool = machine(True)
    """Check every mask before training. Off: invalid masks count as unreadable images when they are read."""

    short_side: int = result(0, section="Scaling")
    """Short side of images in evaluation, in pixels; 0: that of the crop. The long side is at most four times it."""
    min_resize: float = result(0.5)
    """Minimum factor by which a training image is resized before it is cropped."""
    max_resize: float = result(2.0)
    """Maximum factor by which a training image is resized."""
    max_class_share: float = result(0.75)
    """Maximum share of one class in a crop; other crops are drawn again, at most ten times. 1: no limit."""
    photometric: bool = result(True)
    """Change brightness, contrast, saturation and hue at random."""

    window: Literal["slide", "whole"] = result("slide", section="Evaluation")
    """Evaluate images in overlapping windows of the crop size, or as a whole, with positions resampled."""
    stride: int = result(0)
    """Pixels between two windows; 0: two thirds of the crop."""
    flip: bool = result(False)
    """Average the predictions of an image and of its mirror image in evaluation."""
    picture_every: int = machine(10)
    """Epochs between pictures of predicted masks, in `samples/` and TensorBoard; 0: never."""

    export: tuple[Literal["onnx", "torch"], ...] = machine((), section="Export")
    """Formats (`onnx`, `torch`) in which the segmenter of the last epoch is exported to `export/` when the run is
    finished."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "auxiliary", "warmup_steps", "power")
        self._at_least(0, "short_side", "stride", "picture_every")
        require(self.ignore_label is None or self.ignore_label >= 0, "must be at least 0", "ignore_label")
        mapped = bool(self.mask_values) and (self.reduce_zero_label or self.dataset == "ade20k")
        advice = "already assigns values to classes: leave out reduce_zero_label and dataset ade20k"
        require(not mapped, advice, "mask_values", "reduce_zero_label")
        require(self.label_offset is None, "is for lists; for masks see reduce_zero_label", "label_offset")
        self._between(0, 1, "max_class_share")
        require(self.min_resize > 0, "must be more than 0", "min_resize")
        require(self.max_resize >= self.min_resize, "must be at least min_resize", "max_resize", "min_resize")
        most = min(self.input_size)
        require(self.stride <= most, f"{self.stride} leaves gaps between windows of {most} pixels", "stride")
        require(not self.steps or self.warmup_steps < self.steps, "must be less than steps", "warmup_steps", "steps")


def _check_class_weights(words: tuple[str, ...]) -> None:
    """Raise OptionError unless these are weights that are not all 0, or the word `balanced`."""
    if not words or words == ("balanced",):
        return
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = [-1.0]
    fine = all(0 <= weight < math.inf for weight in weights) and any(weights)
    require(fine, f"must be one number for each class, or `balanced`, found {' '.join(words)}", "class_weights")


def describe_model(options: Mapping[str, Any]) -> str:
    """Return the model's name, with the options that change its encoder."""
    names = ("embed_dim", "depth", "num_heads", "patch_stem")
    changed = [f"{name} {options[name]}" for name in names if options.get(name, 0) not in (0, "linear")]
    return str(options.get("model", "")) + (f" with {', '.join(changed)}" if changed else "")


def default_folder(options: RunOptions) -> str:
    """Return the run folder for an empty output_dir: `output/NAME-DATE` with the method's or the program's name."""
    return f"output/{getattr(options, 'method', '') or options.PROGRAM}-{datetime.date.today().isoformat()}"


def resolve_batch(options: Run, processes: int) -> Run:
    """Return the options with total_batch_size, batch_size and accum_iter resolved for `processes` processes.

    total_batch_size = batch_size x accum_iter x processes, whichever of them are given.

    Raises:
        OptionError: the given values do not satisfy this equation.
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
