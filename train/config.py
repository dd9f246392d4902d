"""Every setting of a training run, written once: frozen dataclasses whose fields are the flags and the TOML keys.

`options` reads them from flags and files. The run passes them on whole: `Objective` to the loss, `OptimizerConfig` to
the optimizer, both inside `Recipe`, which is static to the compiled step.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from tyro.conf import DisallowNone

from convert.options import UNSET, Dtype, ProcessOptions, Weights, check_count, check_real, flag
from domino_jax.config import DraftConfig, MarkovHeadType, TargetConfig, choose_target_layer_ids
from domino_jax.runtime.command import UsageError, words_at_fault
from domino_jax.runtime.weight_forms import resolve_weights

LossKind = Literal["ce", "kl", "tv", "dspark", "acceptance"]
HeadKind = Literal["domino", "markov", "selector", "none"]
PositionWeights = Literal["exponential", "uniform", "d-pace"]
DrafterKind = Literal["block", "orthrus", "orthrus-domino"]
LambdaSchedule = Literal["linear", "cosine", "constant"]
BlockAttention = Literal["auto", "dense", "chunked", "cudnn", "pallas"]
TargetAttention = Literal["xla", "cudnn"]
OptimizerName = Literal["adamw", "muon"]

if TYPE_CHECKING:  # imports JAX, which settings are read without
    from domino_jax.drafters.dual_view import DualViewConfig
    from domino_jax.drafters.heads import Head

TrainedConfig: TypeAlias = "DraftConfig | DualViewConfig"  # of what can be trained
T = TypeVar("T")
Unset = Annotated[T | None, DisallowNone, UNSET]  # not given when None; the help does not show that as a value


@dataclass(frozen=True)
class DataConfig:
    """The data."""

    data: Annotated[tuple[str, ...], UNSET] = ()
    """JSONL files or a dataset of the Hub, see docs/training.md; best are answers that the target itself wrote"""
    split: str = "train"
    """split of a Hub dataset"""
    length: int = 3072
    """longest sequence, in tokens; longer ones are cut"""
    pack: bool = False
    """put several short conversations into one sequence"""
    features: Unset[Path] = None
    """folder of python -m train capture: read the target's features instead of computing them"""
    validation: Unset[Path] = None
    """JSONL of held-out prompts, decoded now and then to measure the true acceptance length"""


@dataclass(frozen=True)
class DrafterOptions:
    """The drafter: its shape, and the weights that it begins with."""

    drafter: DrafterKind = "block"
    """block: layers of its own that read the target's (Domino, DFlash); orthrus: a second view of the target, which
    begins as a copy of its attention (arXiv 2605.12825); orthrus-domino: one with Domino's causal head"""
    layers: int = 5
    """layers of the drafter"""
    block_size: int = 16
    """M, rows of a block"""
    target_layer_ids: Annotated[tuple[int, ...], UNSET] = ()
    """target layers whose output the drafter reads; spread over the depth when not given"""
    intermediate_size: Unset[int] = None
    """MLP width of the drafter; the target's when not given"""
    head: HeadKind = "domino"
    """domino: a GRU over the proposals so far; markov: DSpark's, of the token before; selector: DFlash 2's, which
    chooses among the likeliest base logits; none: plain DFlash"""
    gru_hidden_dim: int = 1024
    """width of Domino's GRU"""
    emb_dim: int = 256
    """rank of the head's correction of the logits (DSpark's markov_rank, DFlash 2's selector_rank)"""
    pure_draft_prefix_len: int = 1
    """Domino's head does not correct this many first proposals"""
    markov_head_type: MarkovHeadType = "vanilla"
    """DSpark's forms of the head; rnn knows all tokens before"""
    enable_confidence_head: bool = False
    """of a Markov head: also learn how likely each proposal is to be accepted"""
    selector_top_k: int = 16
    """base logits that a selector chooses among"""
    conv_kernel_size: int = 0
    """rows that DFlash 2's convolutions in the layers mix, 2 in its own; none when 0"""
    conv_group_size: int = 16
    """channels that share the part of a convolution which depends on the input"""
    causal: bool = False
    """no row of a block sees later ones (JetSpec)"""
    shift_label: Unset[bool] = None
    """the anchor's own row makes the first proposal; with Domino's head and DSpark's yes, else no, when not given"""
    mask_token_id: Unset[int] = None
    """the tokenizer's mask token when not given; 151669 for Qwen3"""
    init: Literal["random", "target-layers"] = "random"
    """first weights; target-layers copies the target's last layers"""
    init_from: Unset[Path] = None
    """begin with the weights of the drafter in this folder; a DFlash drafter gets a head that corrects nothing yet"""
    freeze_backbone: bool = False
    """train the head alone (with --init-from or --init target-layers)"""
    freeze_output: bool = False
    """of a second view keep the copied output projections: train queries, keys and values alone"""


@dataclass(frozen=True)
class Objective:
    """The loss, (1 - λ)·final + λ·base, and how it is computed (docs/algorithm.md, section 7)."""

    anchors: int = 256
    """A, blocks a sequence"""
    loss: Unset[LossKind] = None
    """cross-entropy to the tokens; KL divergence or total variation to the target's distribution; DSpark's mixture of
    both kinds; or acceptance: minus the drafts that are accepted until one fails. ce when not given, kl of a second
    view"""
    position_weights: Unset[PositionWeights] = None
    """weights of a block's proposals: exp(-(j - 1)/γ), all alike, or D-PACE (arXiv 2605.18810); exponential when not
    given, uniform of a second view and with --loss acceptance, which has weights of its own"""
    d_pace_alpha: float = 0.5
    """α, how much D-PACE smooths the probabilities"""
    gamma: float = 7.0
    """γ, decay of the exponential weights"""
    lambda_schedule: LambdaSchedule = "linear"
    """how λ falls from its start to its floor"""
    lambda_base_start: float = 1.0
    """λ at the first step"""
    lambda_base_decay_ratio: float = 1.0
    """λ reaches its floor after this share of the steps"""
    lambda_base_floor: float = 0.0
    """λ falls to this value and stays there: above 0, the base logits are trained to the end"""
    chunk: int = 1024
    """proposals whose logits exist at a time on a device"""
    block_attention: BlockAttention = "auto"
    """attention of the blocks to their context: dense holds all scores in memory, chunked some at a time; cudnn
    (NVIDIA, bfloat16) and pallas (TPU) are kernels that are not measured yet"""
    target_attention: TargetAttention = "xla"
    """attention of the frozen target"""
    remat: bool = False
    """compute the drafter's layers again in the backward pass: less memory, more time"""

    @property
    def reads_target(self) -> bool:
        """Whether the loss reads the target's distribution, and not the tokens alone."""
        return self.loss not in (None, "ce")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    optimizer: OptimizerName = "adamw"
    """muon: for the matrices, with AdamW for the rest"""
    lr: float = 6e-4
    """peak learning rate of AdamW"""
    muon_lr: float = 0.02
    """peak learning rate of Muon"""
    warmup: float = 0.04
    """the learning rate rises over this share of the steps"""
    weight_decay: float = 0.01
    """decay of matrices; norms and biases do not decay"""
    clip: float = 1.0
    """largest global gradient norm"""
    ema: float = 0.0
    """decay of a running average of the weights; 0 for none. With one, the average is written and validated"""


@dataclass(frozen=True)
class RunConfig:
    """The run: how long, on which devices, and what is kept."""

    steps: Unset[int] = None
    """optimizer steps; as many as --epochs takes when not given"""
    epochs: float = 6.0
    """passes over the data"""
    batch: int = 8
    """sequences a step, on all devices together"""
    accumulate: int = 1
    """compute a batch in this many parts: less memory, more time, the same gradient"""
    mesh: Unset[str] = None
    """devices, such as data=1,fsdp=4,model=2; all of them on fsdp when not given (one on a CPU)"""
    dtype: Unset[Dtype] = None
    """of the computation; masters are float32. float32 on a CPU, bfloat16 elsewhere when not given"""
    weights: Weights = "auto"
    """form of the frozen target's matrices, as of python -m infer: exact, which auto is too, int8 or float8"""
    seed: int = 0
    """of the first weights, the order of the data and the anchors"""
    log_every: int = 10
    """steps between two lines of metrics"""
    save_every: int = 200
    """steps between two checkpoints"""
    keep: int = 3
    """newest checkpoints to keep; the best one stays besides"""
    validate_every: int = 0
    """steps between validations, each with a checkpoint; as --save-every when 0"""
    validation_tokens: int = 64
    """new tokens for each prompt"""
    validation_prompts: int = 32
    """use this many prompts of the file"""
    max_grad_norm_ratio: float = 1000.0
    """stop at a step whose gradient norm is this many times the median of the steps before"""
    tensorboard: bool = True
    """write events for TensorBoard"""


@dataclass(frozen=True)
class TrainConfig:
    """Train a Domino drafter for a frozen target (base-anchored curriculum)."""

    target: Unset[str] = None
    """the frozen target: a name such as qwen3-4b, a folder, or org/repo on the Hub"""
    out: Path = Path("runs/drafter")
    """folder of the run"""
    config: Unset[str] = None
    """TOML file of settings, or a shipped recipe: demo, demo-orthrus, qwen3-4b, qwen3-8b"""
    resume: bool = False
    """continue the run in --out, with its own settings"""
    data: DataConfig = field(default_factory=DataConfig)
    drafter: DrafterOptions = field(default_factory=DrafterOptions)
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    processes: ProcessOptions = field(default_factory=ProcessOptions)


@dataclass(frozen=True)
class Recipe:
    """What shapes the compiled step; static to it."""

    target: TargetConfig
    draft: "TrainedConfig"
    objective: Objective
    optimizer: OptimizerConfig
    steps: int  # of the whole run: the schedules end there
    dtype: str  # of the computation; masters are float32
    accumulate: int = 1  # parts that a batch is computed in, one after another
    freeze_backbone: bool = False  # train the causal head alone
    freeze_output: bool = False  # of a second view keep the output projections


GROUPS: dict[str, Any] = {
    "data": DataConfig,
    "drafter": DrafterOptions,
    "objective": Objective,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}
# Settings of one start of a run; they are not saved with it.
HERE = ("out", "config", "resume", "processes")


COUNTS = (
    *("batch", "accumulate", "length", "anchors", "chunk", "layers", "block_size", "gru_hidden_dim", "emb_dim"),
    *("selector_top_k", "conv_group_size"),
    *("intermediate_size", "steps", "log_every", "save_every", "keep", "validation_tokens", "validation_prompts"),
)
REALS = {  # by their ranges
    "above 0": ("lr", "muon_lr", "clip", "gamma", "epochs"),
    "from 0 to 1": ("warmup", "lambda_base_start", "lambda_base_floor", "d_pace_alpha"),
    "0 or more": ("weight_decay", "lambda_base_decay_ratio"),
    "from 0 to below 1": ("ema",),
    "above 1": ("max_grad_norm_ratio",),
}


def flat(options: TrainConfig) -> dict[str, Any]:
    """All saved settings by name, without their groups: no name is in two groups."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in (*HERE, *GROUPS)}
    for group in GROUPS:
        values |= {f.name: getattr(getattr(options, group), f.name) for f in fields(GROUPS[group])}
    return values


def check_options(options: TrainConfig) -> TrainConfig:
    """The options, if their values make sense.

    Raises:
        UsageError: one does not, or what is needed was not given.
    """
    values = flat(options)
    if options.target is None or not options.data.data:
        raise UsageError(
            "give --target (a model's name or folder) and --data (JSONL files, or a Hub dataset), or --resume with "
            "--out."
        )
    for name in COUNTS:
        if values[name] is not None:  # left to the run
            check_count(name, values[name])
    for name in ("validate_every", "mask_token_id", "pure_draft_prefix_len", "conv_kernel_size"):
        if values[name] is not None:
            check_count(name, values[name], least=0)
    for layer in values["target_layer_ids"]:
        check_count("target_layer_ids", layer, least=0)
    check_count("seed", values["seed"], least=0, limit=2**32)
    with words_at_fault():
        resolve_weights(options.run.weights)
    for rule, names in REALS.items():
        for name in names:
            check_real(name, values[name], rule)
    if options.run.batch % options.run.accumulate:
        raise UsageError(f"--accumulate {options.run.accumulate} does not divide --batch {options.run.batch}.")
    objective = options.objective
    if objective.lambda_base_floor > objective.lambda_base_start:
        raise UsageError(
            f"λ can't fall from {objective.lambda_base_start} to {objective.lambda_base_floor}: give "
            "--lambda-base-floor at most --lambda-base-start."
        )
    drafter = options.drafter
    _check_kind(options)
    _check_loss(options)
    if drafter.init != "random" and drafter.init_from:
        raise UsageError(f"a drafter begins in one way: give --init {drafter.init} or --init-from, not both.")
    if drafter.freeze_backbone and drafter.head == "none":
        raise UsageError("--freeze-backbone trains the head alone, so it needs a head: leave out --head none.")
    if drafter.freeze_backbone and drafter.init == "random" and not drafter.init_from:
        raise UsageError(
            "--freeze-backbone keeps the first weights of the backbone, which are random here: give --init-from a "
            "drafter."
        )
    return options


OF_BLOCKS = (
    *("layers", "target_layer_ids", "intermediate_size", "shift_label", "init", "freeze_backbone", "features"),
    *("head", "markov_head_type", "enable_confidence_head", "selector_top_k", "causal"),
    *("conv_kernel_size", "conv_group_size"),
)
OF_HEADS = {
    "markov": ("a Markov head", ("markov_head_type", "enable_confidence_head")),
    "selector": ("a selector", ("selector_top_k",)),
}
OF_TV = ("tv", "dspark", "acceptance")  # losses of the total variation between drafter and target


def _check_loss(options: TrainConfig) -> None:
    """Refuse settings that the loss has no use for, or that need another one."""
    objective = options.objective
    if objective.loss == "acceptance" and objective.position_weights not in (None, "uniform"):
        raise UsageError(
            "--loss acceptance weighs a block's proposals by itself: leave out --position-weights "
            f"{objective.position_weights}."
        )
    if options.drafter.head == "selector" and objective.loss not in (None, "ce"):
        raise UsageError(
            f"a selector proposes a few tokens alone, and --loss {objective.loss} compares whole distributions: give "
            "--loss ce."
        )
    if options.drafter.enable_confidence_head and objective.loss not in OF_TV:
        raise UsageError(
            "a confidence head learns from the total variation to the target's distribution: give --loss "
            f"{', '.join(OF_TV[:-1])} or {OF_TV[-1]} with --enable-confidence-head."
        )


def _check_kind(options: TrainConfig) -> None:
    """Refuse settings of another kind of drafter."""
    given, usual = flat(options), flat(TrainConfig())
    kind = options.drafter.drafter
    if kind == "block":
        if options.drafter.freeze_output:
            raise UsageError("--freeze-output is for a second view: give --drafter orthrus.")
        for head, (said, names) in OF_HEADS.items():
            wrong = [name for name in names if given[name] != usual[name]]
            if options.drafter.head != head and wrong:
                raise UsageError(f"{flag(wrong[0])} is of {said}: give --head {head}, or leave it out.")
        if given["conv_group_size"] != usual["conv_group_size"] and not given["conv_kernel_size"]:
            raise UsageError("--conv-group-size is of convolutions: give --conv-kernel-size, or leave it out.")
        return
    head_alone = kind == "orthrus-domino" and options.drafter.init_from is not None
    others = [name for name in OF_BLOCKS if name != "freeze_backbone" or not head_alone]
    wrong = [name for name in others if given[name] != usual[name]]
    if wrong:
        words = ", ".join(map(flag, wrong))
        raise UsageError(f"a second view has its target's layers and begins as their copy: leave out {words}.")


def settled(options: TrainConfig) -> TrainConfig:
    """The options with what the kind of drafter decides where nothing was given."""
    view, objective = options.drafter.drafter != "block", options.objective
    even = view or objective.loss == "acceptance"
    return replace(
        options,
        objective=replace(
            objective,
            loss=objective.loss or ("kl" if view else "ce"),
            position_weights=objective.position_weights or ("uniform" if even else "exponential"),
        ),
    )


def view_config(options: DrafterOptions, target: TargetConfig) -> "DualViewConfig":
    """The second view's config, once its mask token is known."""
    from domino_jax.drafters.dual_view import DualViewConfig
    from domino_jax.drafters.heads.domino import DominoHead

    assert options.mask_token_id is not None
    head = DominoHead(options.gru_hidden_dim, options.emb_dim, options.pure_draft_prefix_len)
    return DualViewConfig(
        **target.geometry(),
        block_size=options.block_size,
        mask_token_id=options.mask_token_id,
        head=head if options.drafter == "orthrus-domino" else None,
    )


def draft_config(options: DrafterOptions, target: TargetConfig) -> DraftConfig:
    """The drafter's config, once its mask token is known: its layers have the target's geometry."""
    from domino_jax.drafters.convolution import Convolution  # imports JAX, which settings are read without

    assert options.mask_token_id is not None
    return DraftConfig(
        **target.geometry(
            num_hidden_layers=options.layers,
            intermediate_size=options.intermediate_size or target.intermediate_size,
        ),
        block_size=options.block_size,
        mask_token_id=options.mask_token_id,
        target_layer_ids=options.target_layer_ids or choose_target_layer_ids(target.num_hidden_layers, options.layers),
        num_target_layers=target.num_hidden_layers,
        shift_label=options.head in ("domino", "markov") if options.shift_label is None else options.shift_label,
        head=_head(options),
        causal=options.causal,
        convolution=Convolution(options.conv_kernel_size, options.conv_group_size)
        if options.conv_kernel_size
        else None,
    )


def _head(options: DrafterOptions) -> "Head | None":
    from domino_jax.drafters.heads.domino import DominoHead  # imports JAX, which settings are read without
    from domino_jax.drafters.heads.markov import MarkovHead
    from domino_jax.drafters.heads.selector import SelectorHead

    if options.head == "markov":
        return MarkovHead(options.emb_dim, options.markov_head_type, options.enable_confidence_head)
    if options.head == "selector":
        return SelectorHead(options.emb_dim, options.selector_top_k)
    if options.head == "domino":
        return DominoHead(options.gru_hidden_dim, options.emb_dim, options.pure_draft_prefix_len)
    return None
