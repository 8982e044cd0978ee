"""What a rank takes: of one call's programs, as they say; of a component, as far as its weights go, as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from xdit_compile.driver.model_runner import ModelRunner
from xdit_compile.driver.parallel_model import Parallel
from xdit_compile.driver.program_source import Runnable
from xdit_compile.ir.packed_tensors import parts
from xdit_compile.ir.program import Program
from xdit_compile.report.memory import RankMemory, rank_memory
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram


def memory_of(compiled: Runnable) -> RankMemory:
    """What a rank takes that runs this."""
    return rank_memory(*_programs(compiled.body, compiled.invariant, compiled.stage))


def memory_of_stage(stage: StageProgram) -> RankMemory:
    """What a rank of a stage takes."""
    return rank_memory(*_programs(stage.once, stage.invariant, stage))


def memory_of_component(module: nn.Module, device: torch.device) -> RankMemory:
    """What a component takes on this rank after it ran: its weights and shares of them as they are now, on ``device``
    or the host; all else as the programs say that ran so far, at the worst moment."""
    runners: Mapping[str, ModelRunner] = module.runners if isinstance(module, Parallel) else {}
    programs, lasting = list[Program](), list[Program]()
    for ready in (ready for runner in runners.values() for ready in runner.programs.values()):
        more, kept = _programs(ready.compiled.body, ready.compiled.invariant, ready.compiled.stage)
        programs += more
        lasting += kept
    held = {id(t): t for t in (*module.parameters(), *module.buffers()) if not t.is_meta}
    stores = [holder.store for holder in (*runners.values(), *filter(None, [getattr(module, "shares", None)]))
              if holder.store is not None]
    here = nbytes_of(t for t in held.values() if t.device == device)
    away = nbytes_of(t for t in held.values() if t.device != device)
    for store in stores:
        shares = nbytes_of(store.values())
        here, away = (here, away + shares) if store.offload else (here + shares, away)
    said = rank_memory(programs, lasting) if programs else RankMemory()
    return replace(said, weights=here, host=away)


def together(memories: Iterable[RankMemory]) -> RankMemory:
    """What components take that run one after the other: all that stays, and of the rest the most."""
    found = list(memories)
    worst = max(found, key=lambda m: m.gathered + m.activations + m.exchanged + m.arguments, default=RankMemory())
    return replace(worst, weights=sum(m.weights for m in found), kept=sum(m.kept for m in found),
                   host=sum(m.host for m in found))


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """Where components run: the GPU, if one of them is there."""
    held = [t.device for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta]
    return next((d for d in held if d.type != "cpu"), torch.device("cpu"))


def _programs(body: Program, invariant: Program | None,
              stage: StageProgram | None) -> tuple[list[Program], list[Program]]:
    """All of a call, and those whose results are kept while the others run."""
    lasting = [p for p in ((stage.invariant, stage.once) if stage else (invariant,)) if p]
    return [*lasting, *(stage.units.values() if stage else (body,))], lasting


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all parts of these, packed ones among them."""
    return sum(p.numel() * p.element_size() for t in tensors for p in parts(t).values())
