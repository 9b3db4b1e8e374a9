"""Everything that a speedrun needs, tried before step 0: data, machine, kernels."""

import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from gptfast.attention import choose_attention
from gptfast.chat_data import MID_TRAIN, MID_VAL, SFT_TRAIN, SFT_VAL, open_mixtures
from gptfast.chat_data.mixture import EMBEDDED, Part
from gptfast.config import BaseSettings
from gptfast.config_chat import MixtureSettings
from gptfast.data import prepare_corpus, shards_in
from gptfast.errors import UserError
from gptfast.evaluate import core_fetch
from gptfast.evaluate.core_bundle import CORE_TASKS, load_bundle
from gptfast.memory import GIB, USABLE_SHARE, largest_device_batch
from gptfast.nvml import energy_counters, link_gb_per_second
from gptfast.parallel import check_gpu
from gptfast.selfcheck.kernels import Case, kernel_cases, kernel_error
from gptfast.selfcheck.links import all_reduce_gb_per_second
from gptfast.speedrun.disk import disk_needs
from gptfast.speedrun.estimate import DiskNeed, Here, config_of, memory_estimate
from gptfast.speedrun.plan import Plan
from gptfast.speedrun.settings import SpeedrunSettings
from gptfast.tokenizer import Tokenizer

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
_ANSWER_SECONDS = 10.0
# Of the links' rate: what an all-reduce reaches that goes over them is to be above, and what one
# reaches that goes another way below.
_LINK_SHARE = {"NVLink": 0.5, "PCIe": 0.25}
# More memory in use than what a CUDA context takes: another program is on the card.
_OTHERS_BYTES = 2 * GIB


class SkippedError(Exception):
    """This check says nothing here; the message says why."""


@dataclass(frozen=True)
class Result:
    """state: ok, failed or skipped. detail: what was found, and where it failed what to do."""

    name: str
    state: str
    detail: str


def run_checks(
    plan: Plan, settings: SpeedrunSettings, stages: Mapping[str, Any], here: Here
) -> Iterator[Result]:
    """One result after the other, each as soon as it is known. stages: base, mid and sft -> what
    their recipes are told."""
    base = stages["base"]
    on_gpu = torch.device("cuda", 0) if plan.on_gpu else torch.device("cpu")
    checks: dict[str, Callable[[], str]] = {
        "text": partial(check_text, settings, base),
        "tokenizer": partial(check_tokenizer, plan, settings, base),
        "CORE bundle": partial(check_bundle, settings, offline=_left_out(plan, "core")),
        "mid mixture": partial(check_mixture, stages["mid"].mixture, MID_TRAIN, MID_VAL),
        "sft mixture": partial(check_mixture, stages["sft"].mixture, SFT_TRAIN, SFT_VAL),
        "chat tasks": partial(check_chat_tasks, plan, settings),
        "disk": partial(check_disk, disk_needs(plan, stages, settings.cache)),
        "GPUs": partial(check_gpus, plan),
        "memory": partial(check_memory, base, here),
        "links": partial(check_links, plan),
        "energy": partial(check_energy, plan),
        "attention": partial(check_attention, base, on_gpu),
    }
    for case in kernel_cases(on_gpu):
        checks[f"kernel {case.name}"] = partial(check_kernel, case, plan, on_gpu)
    for name, work in checks.items():
        try:
            yield Result(name, OK, work())
        except SkippedError as skipped:
            yield Result(name, SKIPPED, str(skipped))
        except UserError as error:
            yield Result(name, FAILED, str(error))
        except Exception as error:
            # Whatever it is: that it is broken here is what is to be told.
            last = (str(error).strip().splitlines() or [""])[-1]
            yield Result(name, FAILED, f"{type(error).__name__}: {last}")


def check_text(settings: SpeedrunSettings, base: BaseSettings) -> str:
    spec = base.data.data
    if spec == "fineweb-edu":
        here = shards_in(settings.cache / "data" / spec)
        hub_answers("karpathy/fineweb-edu-100b-shuffle", "--data: a folder of text")
        return f"{here} shard(s) of fineweb-edu here, the Hub answers for the others"
    corpus = prepare_corpus(
        spec, cache=settings.cache / "data", validation=base.data.validation, progress=False
    )
    train, val = (sum(group.rows for group in groups) for groups in (corpus.train, corpus.val))
    return f"{corpus.name}: {train:,} documents to train on, {val:,} to validate with"


def check_tokenizer(plan: Plan, settings: SpeedrunSettings, base: BaseSettings) -> str:
    """The one that is there; or that one can be trained."""
    folder, size = plan.folders["tokenizer"], base.model.vocab_size
    if settings.tokenizer or (folder / "tokenizer_config.json").is_file():
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size != size:
            raise UserError(
                f"{folder} holds {tokenizer.vocab_size} tokens, --vocab-size is {size}: give "
                f"--vocab-size {tokenizer.vocab_size}"
            )
        return f"{size:,} tokens, {folder}"
    text = "What is trained here gives this back: ßüß 한국어 <|bos|> 12345."
    tokenizer = Tokenizer.train([text] * 20, 300)
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise UserError("a tokenizer trained here does not give its text back: reinstall rustbpe")
    return f"will be trained, {size:,} tokens; a trial of it gave its text back"


def check_bundle(settings: SpeedrunSettings, *, offline: str) -> str:
    folder = settings.core_bundle or settings.cache / core_fetch.FOLDER
    if settings.core_bundle is None and not folder.is_dir():
        if offline:
            raise SkippedError(f"CORE is left out: {offline}")
        answers(core_fetch.ARCHIVE.url, "--core-bundle: the folder that eval_bundle.zip unpacks to")
        return "will be fetched (162 MB); its server answers"
    bundle = load_bundle(folder)
    found = f"{len(bundle.tasks)} of {len(CORE_TASKS)} tasks in {folder}"
    if bundle.missing:
        found += f"; without {', '.join(bundle.missing)} there is no CORE, only a part of it"
    return found


def check_mixture(mixture: MixtureSettings, train: Sequence[str], val: Sequence[str]) -> str:
    """Read the conversations to learn from, if all are here; what is to be fetched is not."""
    names = {Part.parse(part).name for part in (*(mixture.train or train), *mixture.val)}
    named = {n for n in names if n != EMBEDDED and not Path(n).expanduser().exists()}
    if named and mixture.chat_data is None:
        hub_answers("HuggingFaceTB/smol-smoltalk", "--chat-data: a folder with copies")
        return "will be fetched (1 GB) where it is not in the cache; the Hub answers"
    found = open_mixtures(mixture, train=train, val=val)
    sizes = len(found.train.task), len(found.val.task)
    return "{:,} conversations to train on, {:,} to validate with".format(*sizes)


def check_chat_tasks(plan: Plan, settings: SpeedrunSettings) -> str:
    steps = [step for step in plan.steps if step.name.startswith("chat-")]
    if not steps:
        raise SkippedError(_left_out(plan, "chat-mid") or "no chat evaluation is planned")
    if settings.chat_data is None:
        hub_answers("openai/gsm8k", "--chat-data: a folder with copies of the tasks")
        return "will be fetched (60 MB); the Hub answers"
    left_out = _left_out(plan, "chat-mid")
    return f"in {settings.chat_data}{f'; left out: {left_out}' if left_out else ''}"


def check_disk(disks: Sequence[DiskNeed]) -> str:
    for need in disks:
        try:
            with tempfile.TemporaryFile(dir=need.folder):
                pass
        except OSError as error:
            told = f"cannot write to {need.folder}: {error.strerror}; --out or --cache"
            raise UserError(told) from error
    told = ", ".join(map(str, disks))
    if not all(need.enough for need in disks):
        advice = 'another --out or --cache, or fewer checkpoints: --base-flags="--keep 1"'
        raise UserError(f"{told}: {advice}")
    return told


def check_gpus(plan: Plan) -> str:
    if not plan.on_gpu:
        raise SkippedError("no GPU is used")
    names, busy = set(), []
    for index in range(plan.processes):
        check_gpu(index)
        names.add(torch.cuda.get_device_name(index))
        free, total = torch.cuda.mem_get_info(index)
        if total - free > _OTHERS_BYTES:
            busy.append(f"GPU {index}: {(total - free) / GIB:.1f} GiB in use")
    if busy:
        raise UserError(f"{'; '.join(busy)}: end the other program, or use fewer --processes")
    if len(names) > 1:
        raise UserError(
            f"GPUs of {len(names)} kinds, {', '.join(sorted(names))}, and the slowest would rule: "
            "name those of one kind in CUDA_VISIBLE_DEVICES"
        )
    return f"{plan.processes} x {names.pop()}"


def check_memory(base: BaseSettings, here: Here) -> str:
    estimated = memory_estimate(base, here)
    if here.gpu is None:
        raise SkippedError(f"no GPU is used; about {estimated} of main memory a process")
    room = int(USABLE_SHARE * here.gpu_memory)
    if estimated.total <= room:
        return f"about {estimated} of {here.gpu_memory / GIB:.1f} GiB a GPU"
    sequences = base.optim.total_batch_size // (base.model.sequence_len * here.gpus * here.nodes)
    sharing = here.sharing(base.system, accumulates=True)
    most = largest_device_batch(room, config_of(base), sequences=sequences, **sharing)
    advice = "give a smaller --depth"
    if most:
        advice = f'--base-flags="--device-batch-size {most}" should fit'
    raise UserError(f"about {estimated}, but a GPU has {here.gpu_memory / GIB:.1f} GiB: {advice}")


def check_links(plan: Plan) -> str:
    if not plan.on_gpu or plan.processes == 1:
        raise SkippedError("no two GPUs are used")
    reached = all_reduce_gb_per_second(plan.processes)
    told = f"all-reduce of {plan.processes} GPUs: {reached:.0f} GB/s a GPU"
    links = link_gb_per_second()
    if links is None:
        return f"{told}; the driver does not tell what the links give"
    given, by = links
    told += f", {reached / given:.0%} of the {given:.0f} GB/s that {by} give"
    least = next(share for kind, share in _LINK_SHARE.items() if kind in by)
    if reached < least * given:
        raise UserError(
            f"{told}; at least {least:.0%} is expected: `nvidia-smi topo -m` and NCCL_DEBUG=INFO "
            "show which way it goes"
        )
    return told


def check_energy(plan: Plan) -> str:
    if not plan.on_gpu:
        raise SkippedError("no GPU is used")
    counters = energy_counters()
    if not counters or None in counters:
        raise SkippedError("NVML does not count energy here: the report will not have it")
    return f"NVML counts the energy of {len(counters)} GPU(s)"


def check_attention(base: BaseSettings, device: torch.device) -> str:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = []
    for documents in (False, True):
        choice = choose_attention(
            base.system.attention,
            device,
            dtype,
            config_of(base).head_dim,
            deterministic=base.system.deterministic,
            documents=documents,
        )
        names.append(f"{choice.backend} ({choice.reason})")
    rows, documents = names
    return rows if rows == documents else f"{rows}; for packed conversations {documents}"


def check_kernel(case: Case, plan: Plan, device: torch.device) -> str:
    if not plan.on_gpu:
        raise SkippedError("no GPU: plain PyTorch runs instead")
    if wrong := kernel_error(case, device, torch.bfloat16):
        raise UserError(
            f'{wrong}: --base-flags="--kernels reference", and the same in --evaluate-flags, '
            "--mid-flags, --sft-flags, --rl-flags and --chat-flags, runs without our kernels; "
            "please report"
        )
    return f"agrees with its reference{', backward too' if case.backward else ''}"


def answers(url: str, instead: str) -> None:
    """UserError, with what to give instead, unless something answers at the address."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
            pass
    except OSError as error:
        raise UserError(f"{url} does not answer ({error}): {instead}, or --offline") from error


def hub_answers(dataset: str, instead: str) -> None:
    """As `answers`, of a dataset's page on the Hub that HF_ENDPOINT names, where downloads go."""
    answers(f"{constants.ENDPOINT}/datasets/{dataset}", instead)


def _left_out(plan: Plan, step: str) -> str:
    """Why the plan is without the step, or without a part of it; "" if it is whole."""
    return "; ".join(why for name, why in plan.missing if name == step)
