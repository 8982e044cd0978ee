"""The sharding spec: how many devices, split in which way. A value that parses, prints and checks itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xdit_compile.errors import SpecError, did_you_mean

BACKENDS = ("eager", "inductor", "onediff")
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
ENCODERS = ("everywhere", "spread", "shard")
KEEP = ("on", "off")
OFFLOAD = ("none", "block")
APART = "apart"
EXCHANGE = ("together", APART)
CACHES = ("none", "first_block", "interval", "teacache", "taylor")
DISPLACED = ("no", "yes")
WIRES = ("whole", "fp8", "int8")
KERNELS = ("auto", "torch", "flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "sage", "xformers", "yunchang")
ALL = "all"
SHORT = {"kernel": "attention_kernel", "patches": "num_patches", "warmup": "warmup_steps", "mode": "compile_mode",
         "threshold": "cache_threshold", "every": "cache_every", "coefficients": "cache_coefficients"}
"""Other words for fields; a degree's may also leave out ``_degree``."""
DEGREES = ("ulysses_degree", "ring_degree", "tensor_degree", "cfg_degree", "data_degree", "pipefusion_degree",
           "vae_degree", "shard_degree")
NUMBERS = (*DEGREES, "num_patches", "warmup_steps", "cache_every")


@dataclass(frozen=True)
class ShardingSpec:
    """Degrees of each kind of parallelism; their product is the number of processes.

    Args:
        ulysses_degree: ranks that exchange attention heads for tokens by all-to-all (arXiv 2309.14509). At most
            the number of attention heads; put it on the fastest links.
        ring_degree: groups of such ranks that pass keys and values around a ring (arXiv 2310.01889). The product
            of both is unified sequence parallelism (USP, arXiv 2405.07719).
        exchange: ``together`` sends queries, keys and values of an attention in one message, ``apart`` each by itself,
            as soon as it is computed: more is hidden behind work, and each message has its own latency. It pays on
            slow links only.
        tensor_degree: ranks that share out the weights of linear layers, by their output or input features, and with
            them the heads of attention (tensor parallelism, arXiv 1909.08053). Each holds its part of the weights.
        cfg_degree: ranks that share out the batch of classifier-free guidance, which holds each sample with and
            without its condition.
        data_degree: ranks that share out the samples themselves. For one forward both are one thing: its batch is
            cut into ``data_degree * cfg_degree`` parts.
        pipefusion_degree: stages of a pipeline (PipeFusion, arXiv 2405.14430), each with its share of the blocks and
            of their parameters.
        num_patches: patches of the tokens that follow each other through the stages; 0 for as many as stages. With one,
            the pipeline is exact and runs one stage at a time.
        warmup_steps: steps at the start of a denoising loop that are exact, or ``all``. In others, patches attend to
            keys and values of the step before where those of this one have not come yet; so do ranks under
            ``displaced``; and only others may be skipped by a ``cache``.
        stage_blocks: blocks of each stage, as in ``10+9``; by their operations if it is empty.
        shard_degree: ranks over which parameters are cut, whatever else these ranks do: it takes no further processes.
            A block's are gathered while the block before runs, and dropped after it.
        offload: ``block`` keeps parameters, or a rank's share of them, in the host's memory; a block's are copied while
            the block before runs. ``none`` keeps them on the device.
        vae_degree: ranks that share the height or width of what a pipeline's autoencoder encodes and decodes; the same
            ranks as above, in groups of this many, each of which computes the whole.
        encoders: where a pipeline's text and image encoders live: ``everywhere``; ``spread``: each on one rank, which
            sends the others the embeddings; or ``shard``: parameters cut over all ranks, a block's gathered while the
            block before runs.
        keep: ``on`` computes what does not change from step to step once, as long as the tensors it is made of stay
            the same and are not written into; ``off`` at each step.
        cache: which steps leave blocks out, and add what these added in a step before (approximate). ``first_block``:
            those in which the first block adds about what it did (FBCache); ``teacache``: those whose modulated inputs
            have not moved far since (arXiv 2411.19108); ``interval``: all but one in ``cache_every``; ``taylor``: the
            same, with what blocks add extrapolated (TaylorSeer, arXiv 2503.06923).
        cache_threshold: of ``first_block`` and ``teacache``: the mean absolute change, relative to the mean absolute
            value, up to which a step leaves blocks out.
        cache_every: of ``interval`` and ``taylor``: one step in so many computes all blocks.
        cache_coefficients: of ``teacache``: the polynomial that changes are put through, highest power first, as JSON.
        displaced: ``yes`` lets ranks that share tokens attend to others' keys and values of the step before, while
            those of this one travel (DistriFusion, arXiv 2402.19481); convolutions and group norms likewise.
        wire, wire_keys: in how many bits queries, values and results of attention travel between ranks, and in how
            many keys: ``whole``, or ``fp8`` or ``int8`` with a scale for each token and head. Keys bear rounding worse
            than the rest: where ``wire`` is not whole, ``auto`` is int8 for them, which steps more finely than fp8.
        backend: ``eager`` runs the rewritten graph as it is, ``inductor`` compiles it as torch.compile
            does, ``onediff`` hands it to onediff's compiler, cut at collectives.
        compile_mode: of torch.compile, as ``max-autotune``; with ``inductor``.
        onediff_backend: which of onediff's compilers: ``nexfort``, ``oneflow``, or any name registered with onediff;
            onediff's own default, oneflow, if it is empty.
        compile_options: what else the compiler is told, as a mapping or as JSON of one; kept as JSON. For ``inductor``
            the options of torch.compile, for ``onediff`` those of its compiler.
        attention_kernel: ``auto`` takes flash-attn where it is installed and fits, PyTorch's kernels otherwise;
            a kernel asked for by name is used or refused, never replaced. ``sage`` is approximate.

    Raises:
        SpecError: a degree is not a positive whole number, a word is unknown, or has no effect beside the others.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    exchange: str = "together"
    tensor_degree: int = 1
    cfg_degree: int = 1
    data_degree: int = 1
    pipefusion_degree: int = 1
    num_patches: int = 0
    warmup_steps: int | str = 1
    stage_blocks: str = ""
    shard_degree: int = 1
    offload: str = "none"
    vae_degree: int = 1
    encoders: str = "everywhere"
    keep: str = "on"
    cache: str = "none"
    cache_threshold: float = 0.1
    cache_every: int = 2
    cache_coefficients: str | Sequence[float] = ""
    displaced: str = "no"
    wire: str = "whole"
    wire_keys: str = "auto"
    backend: str = "eager"
    compile_mode: str = "default"
    onediff_backend: str = ""
    compile_options: str | Mapping[str, Any] = ""
    attention_kernel: str = "auto"

    def __post_init__(self) -> None:
        least = dict.fromkeys(DEGREES, 1) | {"num_patches": 0}
        for name in (*least, *(["warmup_steps"] if self.warmup_steps != ALL else [])):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 1):
                also = f", or {ALL}" if name == "warmup_steps" else ""
                raise SpecError(f"{name} must be a whole number of at least {least.get(name, 1)}{also}, got {value!r}")
        for name, allowed in (("exchange", EXCHANGE), ("encoders", ENCODERS), ("keep", KEEP), ("offload", OFFLOAD),
                              ("backend", BACKENDS), ("compile_mode", MODES), ("attention_kernel", KERNELS),
                              ("cache", CACHES), ("displaced", DISPLACED), ("wire", WIRES),
                              ("wire_keys", ("auto", *WIRES))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise SpecError(f"{name} must be one of {', '.join(allowed)}, got {value!r}"
                                f"{did_you_mean(value, allowed)}")
        object.__setattr__(self, "compile_options", _canonical(self.compile_options))
        if self.exchange == APART and self.sequence_degree == 1:
            raise SpecError("exchange=apart is about what ulysses and ring send, which are 1; leave it out, or add "
                            "ulysses=2 or ring=2")
        self._check_compiler()
        self._check_pipefusion()
        self._check_approximations()
        if self.world_size % self.vae_degree:
            raise SpecError(f"vae={self.vae_degree} takes groups of {self.vae_degree} of the processes that the other "
                            f"degrees ask for, but {self.world_size} do not fall into such groups")
        if self.replicas % self.shard_degree:
            stages = f"each of {self.pipefusion_degree} stages on" if self.pipefusion_degree > 1 else "all of them on"
            fits = [str(n) for n in range(2, self.replicas + 1) if self.replicas % n == 0]
            raise SpecError(f"shard={self.shard_degree} cuts parameters over groups of {self.shard_degree} of the "
                            f"ranks that hold the same ones, but they are {stages} {self.replicas}, which do not fall "
                            f"into such groups; {'shard=' + ' or '.join(fits) + ' would' if fits else 'add ulysses=N'}")

    def _check_compiler(self) -> None:
        if not isinstance(self.onediff_backend, str) or not re.fullmatch(r"[\w.-]*", self.onediff_backend):
            raise SpecError(f"onediff_backend is the name of one of onediff's compilers, got {self.onediff_backend!r}")
        for name, default, backends in (("compile_mode", "default", ("inductor",)),
                                        ("onediff_backend", "", ("onediff",)),
                                        ("compile_options", "", ("inductor", "onediff"))):
            if getattr(self, name) != default and self.backend not in backends:
                raise SpecError(f"{name} has no effect with backend={self.backend}; leave it out, or say "
                                f"{' or '.join(f'backend={b}' for b in backends)}")

    def _check_pipefusion(self) -> None:
        if self.pipefusion_degree == 1:
            given = [n for n, default in (("num_patches", 0), ("warmup_steps", 1), ("stage_blocks", ""))
                     if getattr(self, n) != default and not (n == "warmup_steps" and self.keeps_steps)]
            if given:
                raise SpecError(f"{' and '.join(given)} belong to pipefusion, which is 1; add pipefusion=2 or more")
        elif self.ring_degree > 1:
            raise SpecError(f"pipefusion={self.pipefusion_degree} and ring={self.ring_degree} do not go together: what "
                            "stages keep of other patches is shared out by heads; use ulysses instead of ring")
        if self.stage_blocks:
            counts = self.stage_blocks.split("+")
            if len(counts) != self.pipefusion_degree or not all(c.isdecimal() and int(c) for c in counts):
                raise SpecError(f"stage_blocks names the blocks of each of {self.pipefusion_degree} stages, as in "
                                f"{'+'.join(['7'] * self.pipefusion_degree)}, got {self.stage_blocks!r}")

    def _check_approximations(self) -> None:
        try:
            threshold = float(self.cache_threshold)
        except (TypeError, ValueError):
            threshold = math.nan
        if not 0 <= threshold < math.inf:
            raise SpecError(f"threshold is a number of at least 0, got {self.cache_threshold!r}")
        object.__setattr__(self, "cache_threshold", threshold)
        if not isinstance(self.cache_every, int) or isinstance(self.cache_every, bool) or self.cache_every < 2:
            raise SpecError(f"every is a whole number of at least 2, got {self.cache_every!r}")
        object.__setattr__(self, "cache_coefficients", _numbers("coefficients", self.cache_coefficients))
        for name, default, caches in (("threshold", 0.1, ("first_block", "teacache")),
                                      ("every", 2, ("interval", "taylor")), ("coefficients", "", ("teacache",))):
            if getattr(self, SHORT[name]) != default and self.cache not in caches:
                raise SpecError(f"{name} has no effect with cache={self.cache}; leave it out, or say "
                                f"{' or '.join(f'cache={c}' for c in caches)}")
        if self.pipefusion_degree > 1 and self.keeps_steps:
            word = f"cache={self.cache}" if self.cache != "none" else "displaced=yes"
            raise SpecError(f"{word} and pipefusion={self.pipefusion_degree} do not go together: stages are at "
                            "different steps, and keep values of the step before themselves; use ulysses or ring "
                            "instead of pipefusion")
        if self.displaced == "yes" and self.cache != "none":
            raise SpecError(f"displaced=yes and cache={self.cache} do not go together: what ranks have of each other "
                            "would be several steps old; give one of them")
        if self.displaced == "yes" and self.sequence_degree == 1:
            raise SpecError("displaced=yes is for ranks that share tokens; add ulysses=N or ring=N")
        if self.displaced == "yes" and self.wire != "whole":
            raise SpecError("wire and displaced=yes do not go together: exchanges that take a whole step gain nothing "
                            "by fewer bytes; leave one of them out")
        if self.wire != "whole" and self.sequence_degree == 1:
            raise SpecError(f"wire={self.wire} is for what ranks that share tokens send each other in attention; add "
                            "ulysses=N or ring=N")
        if self.keys_wire != "whole" and self.wire == "whole":
            raise SpecError(f"wire_keys={self.wire_keys} goes with wire={self.wire_keys}: keys bear fewer bits worse "
                            "than what else travels")

    @property
    def polynomial(self) -> list[float]:
        """``cache_coefficients`` as numbers."""
        assert isinstance(self.cache_coefficients, str)
        return json.loads(self.cache_coefficients or "[]")

    @property
    def keys_wire(self) -> str:
        """How keys travel."""
        return self.wire_keys if self.wire_keys != "auto" else "whole" if self.wire == "whole" else "int8"

    @property
    def keeps_steps(self) -> bool:
        """Whether steps use values of steps before, and results differ for it, other than by pipefusion."""
        return self.cache != "none" or self.displaced == "yes"

    @property
    def approximate(self) -> str:
        """The words that change results, as text; empty if none does."""
        words = [f"{name.removesuffix('_degree')}={getattr(self, name)}" for name, exact in (
            ("cache", "none"), ("displaced", "no"), ("wire", "whole"), ("wire_keys", "auto")) if getattr(
                self, name) != exact]
        if self.pipefusion_degree > 1 and self.patches > 1:
            words.append(f"pipefusion={self.pipefusion_degree},patches={self.patches}")
        return ",".join([*words, *(["attention_kernel=sage"] if self.attention_kernel == "sage" else [])])

    @property
    def options(self) -> dict[str, Any]:
        """``compile_options`` as a new mapping."""
        assert isinstance(self.compile_options, str)
        return json.loads(self.compile_options or "{}")

    @property
    def patches(self) -> int:
        """Patches of a step that is not exact; one if all steps are."""
        return 1 if self.warmup_steps == ALL else self.num_patches or self.pipefusion_degree

    @property
    def model_degree(self) -> int:
        """Ranks that run one forward of one sample together."""
        return self.ranks_per_stage * self.pipefusion_degree

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that run one stage of a pipeline of one sample together; all of the model, without stages."""
        return self.sequence_degree * self.tensor_degree

    @property
    def sequence_degree(self) -> int:
        return self.ulysses_degree * self.ring_degree

    @property
    def batch_degree(self) -> int:
        return self.cfg_degree * self.data_degree

    @property
    def world_size(self) -> int:
        return self.batch_degree * self.model_degree

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, or shares of them."""
        return self.world_size // (self.pipefusion_degree * self.tensor_degree)

    @property
    def parts(self) -> bool:
        """Whether a rank holds parts of parameters of its own, or they come to the device block by block."""
        return self.shard_degree > 1 or self.tensor_degree > 1 or self.offload != "none"

    @staticmethod
    def parse(spec: str | Mapping[str, object] | ShardingSpec) -> ShardingSpec:
        """From ``"ulysses=2,ring=2"``, a mapping with the same words, or a spec. Short and full words both work. A
        value in braces is JSON and may hold commas: ``compile_options={"a": 1, "b": 2}``.

        Raises:
            SpecError: an unknown or repeated word, a value that is no number, a method that is not built yet.
        """
        if isinstance(spec, ShardingSpec):
            return spec
        if not isinstance(spec, (str, Mapping)):
            given = f"{spec!r}".partition("\n")[0]
            raise SpecError(f"a sharding spec is text, a mapping or a ShardingSpec, got {given:.60}")
        pairs = pairs_of(spec) if isinstance(spec, str) else [(str(k), v) for k, v in spec.items()]
        known = {f.name: f.name for f in fields(ShardingSpec)}
        known |= {name.removesuffix("_degree"): name for name in known} | SHORT
        values: dict[str, object] = {}
        for word, value in pairs:
            if word not in known:
                meant = did_you_mean(word, SHORTEST)
                raise SpecError(f"unknown word {word!r} in the sharding spec{meant}; known words are "
                                f"{', '.join(SHORTEST)}")
            name = known[word]
            if name in values:
                raise SpecError(f"{name} is given twice in the sharding spec")
            values[name] = _number(word, value) if name in NUMBERS and value != ALL else value
        return ShardingSpec(**values)  # type: ignore[arg-type]

    def check_world(self, world_size: int) -> None:
        """Raise SpecError unless the degrees multiply to ``world_size``, naming degrees that would."""
        if self.world_size == world_size:
            return
        words = {n: getattr(self, f"{n}_degree") for n in ("data", "cfg", "pipefusion", "tensor")}
        kept = words if world_size % math.prod(words.values()) == 0 else dict.fromkeys(words, 1)
        rest = world_size // math.prod(kept.values())
        before = "".join(f"{n}={d}," for n, d in kept.items() if d > 1)
        rings = kept["pipefusion"] == 1
        fits = [f"{before}ulysses={u}" + (f",ring={rest // u}" if rings else "") for u in range(1, rest + 1)
                if rest % u == 0 and (rings or u == rest)]
        factors = [d for d in words.values() if d > 1] + [self.ulysses_degree, self.ring_degree]
        raise SpecError(
            f"{self} needs {' x '.join(map(str, factors))} = {self.world_size} processes, but "
            f"{world_size} {'is' if world_size == 1 else 'are'} running; degrees that fit: {'; '.join(fits)}"
        )

    def __str__(self) -> str:
        short = {name: word for word, name in SHORT.items()}
        words = [f"{short.get(f.name, f.name.removesuffix('_degree'))}={getattr(self, f.name)}" for f in fields(self)
                 if getattr(self, f.name) != f.default]
        return ",".join(words) or "ulysses=1"


SHORTEST = tuple(({f.name: f.name.removesuffix("_degree") for f in fields(ShardingSpec)} | {
    name: word for word, name in SHORT.items()}).values())
"""The words of a spec as they are printed."""


def pairs_of(text: str) -> list[tuple[str, str]]:
    """The words and values of a spec's text, in order.

    Raises:
        SpecError: a part is no ``word=value``, or a value in braces is no JSON.
    """
    pairs, rest = [], text
    while rest := rest.lstrip(" ,"):
        word, equals, after = rest.partition("=")
        if equals and "," not in word and after.lstrip().startswith(("{", "[")):
            value, rest = _braces(word.strip(), after.lstrip())
        else:
            item, _, rest = rest.partition(",")
            word, equals, value = item.partition("=")
        pair = (word.strip(), value.strip())
        if not equals or not all(pair):
            raise SpecError(f"cannot read {(word + equals + value).strip()!r} in the sharding spec {text!r}; write "
                            "word=value, as in ulysses=2")
        pairs.append(pair)
    return pairs


def _braces(word: str, text: str) -> tuple[str, str]:
    """The JSON that ``text`` begins with, and what follows it."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{word} is no JSON: {error}; got {text!r}") from None
    if text[end:].lstrip()[:1] not in ("", ","):
        raise SpecError(f"after the brackets of {word} comes a comma or nothing, got {text[end:]!r}")
    return text[:end], text[end:]


def _canonical(options: object) -> str:
    """Equal texts for equal options, and no text for none."""
    given = options
    try:
        given = json.loads(given or "{}") if isinstance(given, str) else given
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError("that is no mapping from names")
        return json.dumps(dict(given), sort_keys=True, allow_nan=False) if given else ""
    except (TypeError, ValueError) as error:
        raise SpecError("compile_options is a mapping that JSON can hold, as in {\"max_autotune\": true}, got "
                        f"{options!r}: {error}") from None


def _numbers(word: str, given: object) -> str:
    """A list of numbers as JSON, and no text for none."""
    try:
        made = json.loads(given or "[]") if isinstance(given, str) else list(given)  # type: ignore[call-overload]
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in made):
            raise ValueError("that is no list of numbers")
        return json.dumps([float(n) for n in made], allow_nan=False) if made else ""
    except (TypeError, ValueError) as error:
        raise SpecError(f"{word} are a list of numbers, as in [1.5, 0.2], got {given!r}: {error}") from None


def _number(word: str, value: object) -> object:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise SpecError(f"{word} must be a whole number, got {value!r}") from None
    return value
