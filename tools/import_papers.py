"""The titles of the four seed surveys, read from their text, and papers.csv kept in step with them.

    python tools/import_papers.py          bring papers.csv up to date: new titles, places, links
    python tools/import_papers.py --check  say what differs and change nothing

The seeds (../shared/seeds) are two Markdown lists (000, 002), a list whose headings and links were lost (001) and a
survey whose PDF was turned into text with words run together (003). What a machine can read of them is rewritten: at
which places a title stands, and its links. What a person decided is kept: id, title, year, venue, more links, what a
paper is about.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = ROOT.parent / "shared" / "seeds"
PAPERS = ROOT / "knowledge_base" / "data" / "field" / "papers.csv"
COLUMNS = ("id", "title", "year", "venue", "links", "seeds", "about", "not_yet")
SEPARATOR = " | "


# ---------------------------------------------------------------- what a person found out about the seeds

# Seed 001 lost its headings: the first title under each, in the order of the list. The headings are those of the list's
# own repository (github.com/AIoT-MLSys-Lab/Efficient-LLMs-Survey, May 2024), where nearly every title stands under the
# one given here. GACT, Mesa, "The Truth is in There" and "The EOS Decision" are no longer there: placed by neighbours.
SECTIONS_001 = (
    ("GPTQ: Accurate Quantization for Generative Pre-trained Transformers", "Model-Centric/Model Compression/Quantization/Weight-Only Quantization"),
    ("Intriguing Properties of Quantization at Scale", "Model-Centric/Model Compression/Quantization/Weight-Activation Co-Quantization"),
    ("BitNet: Scaling 1-bit Transformers for Large Language Models", "Model-Centric/Model Compression/Quantization/Quantization-Aware Training"),
    ("LoRAShear: Efficient Large Language Model Structured Pruning and Knowledge Recovery", "Model-Centric/Model Compression/Parameter Pruning/Structured Pruning"),
    ("SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "Model-Centric/Model Compression/Parameter Pruning/Unstructured Pruning"),
    ("The Truth is in There: Improving Reasoning in Language Models with Layer-Selective Rank Reduction", "Model-Centric/Model Compression/Low-Rank Approximation"),
    ("Towards the Law of Capacity Gap in Distilling Language Models", "Model-Centric/Model Compression/Knowledge Distillation/White-Box KD"),
    ("Zephyr: Direct Distillation of LM Alignment", "Model-Centric/Model Compression/Knowledge Distillation/Black-Box KD"),
    ("GACT: Activation Compressed Training for Generic Network Architectures", "Model-Centric/Efficient Pre-Training/Mixed Precision Training"),
    ("Learning to Grow Pretrained Models for Efficient Transformer Training", "Model-Centric/Efficient Pre-Training/Scaling Models"),
    ("Deepnet: Scaling transformers to 1,000 layers", "Model-Centric/Efficient Pre-Training/Initialization Techniques"),
    ("Symbolic Discovery of Optimization Algorithms", "Model-Centric/Efficient Pre-Training/Training Optimizers"),
    ("OpenDelta: A Plug-and-play Library for Parameter-efficient Adaptation of Pre-trained Models", "Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Adapter-based Tuning"),
    ("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", "Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Low-Rank Adaptation"),
    ("LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", "Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Prefix Tuning"),
    ("Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference with Transferable Prompt", "Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Prompt Tuning"),
    ("Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model", "Model-Centric/Efficient Fine-Tuning/Memory-Efficient Fine-Tuning"),
    ("PaSS: Parallel Speculative Sampling", "Model-Centric/Efficient Inference/Speculative Decoding"),
    ("Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs", "Model-Centric/Efficient Inference/KV-Cache Optimization"),
    ("GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", "Model-Centric/Efficient Architecture/Efficient Attention/Sharing-based Attention"),
    ("Nyströmformer: A nyström-based algorithm for approximating self-attention", "Model-Centric/Efficient Architecture/Efficient Attention/Feature Information Reduction"),
    ("Sumformer: Universal Approximation for Efficient Transformers", "Model-Centric/Efficient Architecture/Efficient Attention/Kernelization or Low-Rank"),
    ("Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", "Model-Centric/Efficient Architecture/Efficient Attention/Fixed Pattern Strategies"),
    ("HyperAttention: Long-context Attention in Near-Linear Time", "Model-Centric/Efficient Architecture/Efficient Attention/Learnable Pattern Strategies"),
    ("Mixtral of Experts", "Model-Centric/Efficient Architecture/Mixture of Experts/MoE-based LLMs"),
    ("Lifelong Language Pretraining with Distribution-Specialized Experts", "Model-Centric/Efficient Architecture/Mixture of Experts/Algorithm-Level MoE Optimization"),
    ("Scaling Laws of RoPE-based Extrapolation", "Model-Centric/Efficient Architecture/Long Context LLMs/Extrapolation and Interpolation"),
    ("Retentive Network: A Successor to Transformer for Large Language Models", "Model-Centric/Efficient Architecture/Long Context LLMs/Recurrent Structure"),
    ("Soaring from 4K to 400K: Extending LLM's Context with Activation Beacon", "Model-Centric/Efficient Architecture/Long Context LLMs/Segmentation and Sliding Window"),
    ("Landmark Attention: Random-Access Infinite Context Length for Transformers", "Model-Centric/Efficient Architecture/Long Context LLMs/Memory-Retrieval Augmentation"),
    ("Sparse Modular Activation for Efficient Sequence Modeling", "Model-Centric/Efficient Architecture/Transformer Alternatives/State Space Models"),
    ("PanGu-π: Enhancing Language Model Architectures via Nonlinearity Compensation", "Model-Centric/Efficient Architecture/Transformer Alternatives/Other Sequential Models"),
    ("Data Selection for Language Models via Importance Resampling", "Data-Centric/Data Selection/Pre-Training"),
    ("What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction Tuning", "Data-Centric/Data Selection/Fine-Tuning"),
    ("Unified Demonstration Retriever for In-Context Learning", "Data-Centric/Prompt Engineering/Demonstration Selection"),
    ("Fantastically Ordered Prompts and Where to Find Them: Overcoming Few-Shot Prompt Order Sensitivity", "Data-Centric/Prompt Engineering/Demonstration Ordering"),
    ("Large Language Models as Optimizers", "Data-Centric/Prompt Engineering/Instruction Generation"),
    ("Automatic Chain of Thought Prompting in Large Language Models", "Data-Centric/Prompt Engineering/Multi-Step Reasoning"),
    ("Learning to Compress Prompts with Gist Tokens", "Data-Centric/Prompt Engineering/Prompt Compression"),
    ("TempLM: Distilling Language Models into Template-Based Generators", "Data-Centric/Prompt Engineering/Prompt Generation"),
    ("CoLLiE: Collaborative Training of Large Language Models in an Efficient Way", "System-Level/Pre-Training Efficiency"),
    ("TurboTransformers: an efficient GPU serving system for transformer models", "System-Level/Inference Efficiency"),
    ("FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", "System-Level/Hardware Co-Design"),
)  # fmt: skip

# What seed 001's letters beyond ASCII became, and the names they belong to.
MISREAD_001 = {
    "NystrΓΆm": "Nyström", "nystrΓΆm": "nyström", "LLMβs": "LLM's", "β-former": "∞-former", "PanGu-Ο": "PanGu-π",
    "PanGu-Ξ£": "PanGu-Σ", "οΌ": ", ", "Reductionhttps": "Reduction",
}  # fmt: skip

# Titles a seed writes so differently that no comparison finds them: as written -> as papers.csv has it.
SAME = {
    "Massive language models can be accurately pruned in one-shot": "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "Ziplm:Hardware-awarestructuredpruning of language models": "ZipLM: Inference-Aware Structured Pruning of Language Models",
    "OWQ: Lessons Learned from Activation Outliers for Weight Quantization in Large Language Models": "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
    "OWQ: Lessons learned from activation outliers for weight quantization in large language models": "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
    "Owq: Lessons learned from activation outliers for weightquantization in large language models": "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
    "GPTQ: Accurate Quantization for Generative Pre-trained Transformers": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "SpecInfer: Accelerating Generative LLM Serving with Speculative Inference and Token Tree Verification": "SpecInfer: Accelerating Generative Large Language Model Serving with Speculative Inference and Token Tree Verification",
    "Bamboo: Making Preemptible Instances Resilient for Affordable Training": "Bamboo: Making Preemptible Instances Resilient for Affordable Training of Large DNNs",
    "Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning": "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
    "Pruning meetslow-rankparameter-efficientfine-tuning": "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
    "Carbontracker": "Carbontracker: Tracking and Predicting the Carbon Footprint of Training Deep Learning Models",
    "CodeCarbon": "CodeCarbon: Estimate and Track Carbon Emissions from Machine Learning Computing",
    "LLMCarbon": "LLMCarbon: Modeling the End-to-End Carbon Footprint of Large Language Models",
    "experiment-impact-tracker": "Towards the Systematic Reporting of the Energy and Carbon Footprints of Machine Learning",
    "ML CO2 Impact": "Quantifying the Carbon Emissions of Machine Learning",
    "Megatron": "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
    "Alpa": "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning",
    "ColossalAI": "Colossal-AI: A Unified Deep Learning System For Large-Scale Parallel Training",
    "FairScale": "FairScale: A General Purpose Modular PyTorch Library for High Performance and Large Scale Training",
    "vLLM": "Efficient Memory Management for Large Language Model Serving with PagedAttention",
    "OpenLLM": "OpenLLM: Operating LLMs in production",
    "A High-Performance Transformer Boosted for Variable-Length Inputs": "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
    "https://www.jmlr.org/papers/volume24/23-0069/23-0069.pdf": "Estimating the Carbon Footprint of BLOOM, a 176B Parameter Language Model",
    "https://aclanthology.org/2021.naacl-industry.15.pdf": "LightSeq: A High Performance Inference Library for Transformers",
    "https://github.com/NVIDIA/FasterTransformer": "FasterTransformer: A Faster Transformer Framework",
    "https://jmlr.org/papers/volume21/20-312/20-312.pdf": "Towards the Systematic Reporting of the Energy and Carbon Footprints of Machine Learning",
    "arXiv:2309.06180": "Efficient Memory Management for Large Language Model Serving with PagedAttention",
    "arXiv:2106.05945": "Does Knowledge Distillation Really Work?",
}  # fmt: skip

# Links of the seeds that lead to another paper than the title says, or to none: title as written -> links.
WRONG_LINKS = {
    "DINOv2: Learning Robust Visual Features without Supervision": "https://arxiv.org/abs/2005.12872",
    "You Only Look at One Sequence: Rethinking Transformer in Vision through Object Detection": "https://arxiv.org/abs/2105.15203",
    "Rethinking Attention with Performers": "https://proceedings.neurips.cc/paper/2021/file/14319d9cfc6123106878dc20b94fbaf3-Paper.pdf",
    "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models": "https://arxiv.org/abs/2311.03285 https://github.com/S-LoRA/S-LoRA",
    "GKD: Generalized Knowledge Distillation for Auto-regressive Sequence Models": "https://github.com/njulus/GKD",
    "Llama 2: Open foundation and fine-tuned chat models": "https://llama-2.ai/download/",
    "Switch transformers: Scaling to trillion parameter models with simple and efficient sparsity": "https://github.com/VikParuchuri/marker/blob/master/data/examples/nougat/switch_transformers.md",
    "RWKV: Reinventing RNNs for the Transformer Era": "https://github.com/dcarpintero/machine-learning/blob/main/llms/RWKV.md",
    "Vicuna:Anopen-sourcechatbotimpressing gpt-4 with 90%* chatgpt quality": "https://vicuna.lmsys.",
    "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention": "https://github.com/mit-han-lab/efficientvit",
}  # fmt: skip

# Where the references of seed 003 appeared: squashed words of the reference -> venue. The first that fits counts.
VENUES = (
    ("findingsoftheassociationforcomputationallinguisticsacl", "ACL Findings"),
    ("findingsoftheassociationforcomputationallinguisticsemnlp", "EMNLP Findings"),
    ("findingsoftheassociationforcomputationallinguisticsnaacl", "NAACL Findings"),
    ("findingsoftheassociationforcomputationallinguisticseacl", "EACL Findings"),
    ("transactionsoftheassociationforcomputationallinguistics", "TACL"),
    ("annualmeetingoftheassociationforcomputationallinguistics", "ACL"),
    ("europeanchapter", "EACL"),
    ("naacl", "NAACL"),
    ("empiricalmethods", "EMNLP"),
    ("neuripsefficientnatural", "NeurIPS ENLSP"),
    ("competitionanddemonstrationtrack", "NeurIPS Competition Track"),
    ("neuralinformationprocessingsystems", "NeurIPS"),
    ("internationalconferenceonmachinelearning", "ICML"),
    ("learningrepresentation", "ICLR"),
    ("journalofmachinelearningresearch", "JMLR"),
    ("acmcomputingsurveys", "ACM Computing Surveys"),
    ("internationalsymposiumoncomputerarchitecture", "ISCA"),
    ("highperformancecomputerarchitecture", "HPCA"),
    ("highperformancecomputing", "SC"),
    ("operatingsystemsprinciples", "SOSP"),
    ("operatingsystemsdesign", "OSDI"),
    ("networkedsystems", "NSDI"),
    ("conferenceoncomputersystems", "EuroSys"),
    ("conferenceonparallelprocessing", "ICPP"),
    ("winterconferenceonapplicationsofcomputervision", "WACV"),
    ("europeanconferenceoncomputervision", "ECCV"),
    ("computervisionandpatternrecognition", "CVPR"),
    ("conferenceonpatternrecognition", "ICPR"),
    ("knowledgediscoveryanddatamining", "KDD"),
    ("websearchanddatamining", "WSDM"),
    ("researchanddevelopmentininformationretrieval", "SIGIR"),
    ("acousticsspeech", "ICASSP"),
    ("workloadcharacterization", "IISWC"),
    ("aaaiconference", "AAAI"),
    ("sustainlp", "SustaiNLP"),
    ("interspeech", "Interspeech"),
    ("machinetranslation", "WMT"),
    ("computeraideddesign", "TCAD"),
    ("proceedingsoftheieee", "Proceedings of the IEEE"),
    ("ieeemicro", "IEEE Micro"),
    ("arxiv", "arXiv"),
)


@dataclass(frozen=True, slots=True)
class Mention:
    """A title as one seed writes it. `places`: "003 §6.1.2 [137]"; several where a survey cites it in several sections."""

    places: tuple[str, ...]
    title: str
    year: int | None
    venue: str
    links: tuple[str, ...]

    @property
    def seed(self) -> str:
        return self.places[0][:3]


def mentions() -> tuple[Mention, ...]:
    """Return every title of the four seeds, in their order; one that stands twice in a list is there twice."""
    texts = {path.name[:3]: path.read_text(encoding="utf-8") for path in sorted(SEEDS.glob("*.txt"))}
    readers = {"000": _tables, "001": _bare_list, "002": _markdown_list, "003": _references}
    return tuple(
        replace(m, links=_links(url for url in m.links if url not in WRONG_LINKS.get(m.title, "").split()))
        for seed, reader in readers.items()
        for m in reader(texts[seed])
    )


def squash(title: str) -> str:
    """Return the letters and digits of a title: what survives lost spaces, other capitals and other dashes.

    >>> squash("GPTQ: accurate post-training quan-tization")
    'gptqaccurateposttrainingquantization'
    """
    return re.sub(r"[\W_]", "", title).lower()


def link(url: str) -> str | None:
    """Return a link in the form papers.csv holds, without what a copy left behind; None if it leads nowhere.

    >>> link("https://arxiv.org/pdf/2310.06825.pdf]]%3E")
    'arXiv:2310.06825'
    """
    if re.match(r"https://(?:scholar\.google|www\.bing)\.|https://github\.com/$", url):  # a search, nowhere
        return None
    if found := re.search(r"(?:ar5iv[\w.]*|arxiv)\.org/(?:\w+/)?(\d{4}\.\d{4,5})", url):
        return f"arXiv:{found[1]}"
    url = re.sub(r"\?(?:utm_|trk=|usp=).*$|\(20\d\d\)$", "", url).rstrip(".,").replace("http://", "https://")
    return url if re.fullmatch(r"https://\S+", url) and "%3E" not in url else None


# ---------------------------------------------------------------- 000: Markdown tables


def _tables(text: str) -> Iterator[Mention]:
    body, headings = text.partition("<!---")[2], ["", "", ""]
    survey = re.search(r"survey paper \[(.+?)\]\((.+?)\)", text)
    first = re.search(r"^\| (\d{4})-\d\d .*?\[(.+?)\]\((\S+?)\) *\| *(\w+)", text, re.M)
    assert survey and first, "seed 000 begins otherwise"
    yield Mention(("000 Header",), survey[1], 2024, "arXiv", (survey[2],))
    yield Mention(("000 Header",), first[2], int(first[1]), first[4], (first[3],))
    for line in body.splitlines():
        if found := re.match(r" *(#{2,4}) (.+)", line):
            depth = len(found[1]) - 2
            headings[depth:] = [re.sub(r"[^\x20-\x7e]|\\", "", found[2]).strip(), *[""] * (2 - depth)]
        place = ("000 " + "/".join(h for h in headings if h),)
        if found := re.match(r"\| *(\d{4}) *\|[^|]*\| *\[(.+?)\]\((\S+?)\) *\| *([^|]*?) *\|", line):
            yield Mention(place, found[2], int(found[1]), found[4], (found[3],))
        elif found := re.match(r"  > - \[(.+?)\]\((\S+?)\)", line):
            yield Mention(place, found[1], None, "", (found[2],))
        elif line.startswith("| "):
            for _, url in re.findall(r"\[\\\[(.+?)\\\]\]\((\S+?)\)", line):
                yield Mention(place, "", None, "", (url,))


# ---------------------------------------------------------------- 001: a list without headings


def _bare_list(text: str) -> Iterator[Mention]:
    place, starts = "Header", dict(SECTIONS_001)
    survey = re.match(r"(Efficient .+?) \[arXiv\]", text)
    assert survey, "seed 001 begins otherwise"
    yield Mention(("001 Header",), survey[1], 2023, "arXiv", ())
    for line in text.splitlines():
        for wrong, right in MISREAD_001.items():
            line = line.replace(wrong, right)
        if found := re.match(r"- (.+?)(\?,?|,) ?([^,?]*?),? (20\d\d),? *\[", line):
            title = found[1] + found[2].strip(", ")
            venue = re.sub(r"[^\x20-\x7e]", "", found[3]).strip()
            place = starts.pop(title, place)
            yield Mention((f"001 {place}",), title, int(found[4]), venue, ())
        elif found := re.match(r"(\S+(?: \S+)?) \[Code\] \|", line):
            yield Mention(("001 System-Level/LLM Frameworks",), found[1], None, "software", ())
    assert not starts, f"seed 001 has no {starts}"


# ---------------------------------------------------------------- 002: a Markdown list


def _markdown_list(text: str) -> Iterator[Mention]:
    headings = ["", ""]
    survey = re.search(r"figures for \[(.+?)\]\((.+?)\)", text)
    assert survey, "seed 002 begins otherwise"
    yield Mention(("002 Header",), survey[1], 2024, "arXiv", (survey[2],))
    for line in re.sub(r"\.?\n\)", ")", text).splitlines():
        if found := re.match(r"(##|###) (.+)", line):
            headings = [found[2], ""] if found[1] == "##" else [headings[0], found[2]]
        elif found := re.match(r"- (.+?)\.? *(?:\*\[(.+?)\W? ?['‘’](\d+)'?\]\*|\[\[URL\]\])", line):
            year = int(f"20{found[3]:0<2}") if found[3] else None  # one entry says '2 for '20
            place = "002 " + "/".join(headings)
            urls = re.findall(r"\[\[\w+\]\]\((\S+?)\)(?= |$)", line)
            yield Mention((place,), found[1].strip(), year, (found[2] or "").strip(), tuple(urls))


# ---------------------------------------------------------------- 003: a survey turned into text


def _references(text: str) -> Iterator[Mention]:
    body, _, tail = text.partition("\n### References\n")
    cited = _citations(body)
    survey = "Beyond Efficiency: A Systematic Survey of Resource-Efficient Large Language Models"
    yield Mention(("003 Header",), survey, 2024, "arXiv", ())
    tail = re.sub(r"<!-- Page \d+ -->|^#+ |^\d{1,2}$|^\{ \}$", "", tail, flags=re.M)
    pieces = re.split(r"^\[(\d+)\] ", tail, flags=re.M)[1:]
    for expected, (number, piece) in enumerate(zip(pieces[::2], pieces[1::2]), 1):
        assert int(number) == expected, f"reference [{expected}] is missing in seed 003"
        words = " ".join(re.sub(r"(?<=\w)-\n(?=[a-z])", "-", piece.strip()).split())
        title, rest = _title(words)
        years = re.findall(r"\((\d{4})\)", words) or re.findall(r"(?:19|20)\d\d", rest)
        urls = re.findall(r"https://(?:(?!https:)[^ ,])+", re.sub(r"(https:/\S*[/.=?]) ", r"\1", words))
        ids = re.findall(r"arxiv[: ]+(\d{4}\.\d{4,5})", words, re.I)
        sections = cited.get(int(number), ())
        places = tuple(f"003 §{s} [{number}]" for s in sections) or (f"003 [{number}]",)
        links = (*(f"https://arxiv.org/abs/{i}" for i in ids), *urls)
        yield Mention(places, title, int(years[-1]) if years else None, _venue(rest), links)


# A title ends before what follows it in a reference: a full stop and the beginning of a venue, a year, a link.
_VENUE_BEGINS = (
    "ar[Xx]iv|In:|The [IJ]|Advances|Journal|Proceedings|Findings|Association|ACM|IEEE|Trans|Minds|Meta|Cogent|NAACL|"
    "Interspeech|Knowledge|Artificial|Management|Nature|Cited|See|Sustain|Librairie|Mathem|https|"
    r"[A-Z][a-z]+ ?[A-Za-z]* ?[A-Za-z]* ?\d"
)
_END_OF_TITLE = re.compile(rf"\. ?(?={_VENUE_BEGINS})|\(20\d\d\)| https|\? (?=In:|arXiv|Advances)")


def _title(reference: str) -> tuple[str, str]:
    """Return the title of a reference and what follows: "Sun, M., Liu, Z.: A simple … models. arXiv preprint …"."""
    authors = re.match(r".*?(?:[A-Z]|al|NVIDIA|c D)\.? ?: ?(?=\S)", reference)
    rest = reference[authors.end() if authors else 0 :]
    end = _END_OF_TITLE.search(rest)
    cut = end.start() + (rest[end.start()] == "?") if end else len(rest)
    return rest[:cut].strip(" ."), rest[cut:]


def _venue(rest: str) -> str:
    return next((name for mark, name in VENUES if mark in squash(rest)), "")


def _citations(body: str) -> dict[int, list[str]]:
    """Return the sections in which each reference is cited, in order; a heading is a line "6.1.2 Quantization"."""
    found: dict[int, list[str]] = {}
    section = "1"
    text = body[body.rindex("\n1 Introduction\n") :]
    for part in re.split(r"^(\d{1,2}(?:\.\d){0,2} [A-Z][^\n]*)$", text, flags=re.M):
        if re.match(r"\d", part) and "\n" not in part and _follows(section, part.split()[0]):
            section = part.split()[0]
            continue
        for group in re.findall(r"\[(\d+(?:\s*[,–-]\s*\d+)*)\]", part):
            for item in re.split(r"\s*,\s*", group):
                low, _, high = re.sub(r"\s", "", item).replace("–", "-").partition("-")
                for number in range(int(low), int(high or low) + 1):
                    if section not in found.setdefault(number, []):
                        found[number].append(section)
    return found


def _follows(now: str, new: str) -> bool:
    """Return whether section `new` can come next: lists and tables also have lines that begin with a number."""
    a, b = ([int(x) for x in s.split(".")] for s in (now, new))
    return (len(b) == len(a) + 1 and b == [*a, 1]) or (len(b) <= len(a) and b == [*a[: len(b) - 1], a[len(b) - 1] + 1])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Row:
    """A line of papers.csv."""

    id: str
    title: str
    year: str
    venue: str
    links: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    not_yet: str = ""


def read(path: Path = PAPERS) -> list[Row]:
    """Return the rows of papers.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Row:
    lists = {name: tuple(filter(None, cells[name].split(SEPARATOR))) for name in ("links", "seeds", "about")}
    return Row(cells["id"], cells["title"], cells["year"], cells["venue"], **lists, not_yet=cells["not_yet"])


def write(rows: Iterable[Row], path: Path = PAPERS) -> None:
    """Write papers.csv, sorted by id, so that a change is a short diff."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in sorted(rows, key=lambda r: r.id):
            lists = [SEPARATOR.join(items) for items in (row.links, row.seeds, row.about)]
            out.writerow((row.id, row.title, row.year, row.venue, *lists, row.not_yet))


def merge(found: Iterable[Mention], rows: Iterable[Row]) -> list[Row]:
    """Return the rows with the places and links the seeds give them; a title nobody decided about is a new row."""
    kept = {row.id: replace(row, seeds=()) for row in rows}
    titles = {squash(row.title): row.id for row in kept.values()}
    by_link = {url: row.id for row in kept.values() for url in row.links}
    for mention in sorted(found, key=lambda m: not m.title):  # a bare link is known by a title's link
        title = SAME.get(mention.title or mention.links[0], mention.title)
        key = nearest(squash(title), titles)
        name = titles[key] if key else None
        if not title:
            name = by_link.get(mention.links[0])
            assert name, f"{mention.places[0]}: which paper is {mention.links[0]}? Say so in SAME."
        if name is None:
            name = _new_id(title, mention.year, kept)
            kept[name] = Row(name, title, str(mention.year or ""), mention.venue)
            titles[squash(title)] = name
        row = kept[name]
        by_link |= dict.fromkeys(mention.links, name)
        kept[name] = replace(row, seeds=_once(row.seeds, mention.places), links=_once(row.links, mention.links))
    return list(kept.values())


def nearest(title: str, titles: Collection[str]) -> str | None:
    """Return the squashed title that is the same, or the same but for a few letters, as a bad copy leaves it."""
    if title in titles:
        return title
    best, found = 0.93, None
    for known in titles:
        matcher = SequenceMatcher(None, known, title, autojunk=False)
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and (ratio := matcher.ratio()) > best:
            best, found = ratio, known
    return found


def _once(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def _new_id(title: str, year: int | None, taken: dict[str, Row]) -> str:
    """Return an id: the name before the colon, or the first words of the title, and the year."""
    name, _, rest = title.partition(":")
    words, short = (re.findall(r"[a-z0-9]+", text.lower()) for text in (title, name))
    for choice in (short if rest and len(short) < 5 else words[:5], words[:5], words[:8], words):
        key = "_".join([*choice, str(year or "undated")])
        if key not in taken:
            return key
    raise ValueError(f"two papers would be called {key}: {title}")


def _links(urls: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found for url in urls if (found := link(url))))


def changes() -> tuple[str, ...]:
    """Return what a run would change in papers.csv, a line for each row."""
    old, new = {r.id: r for r in read()}, {r.id: r for r in merge(mentions(), read())}
    return tuple(
        f"{name}: {'new' if name not in old else 'places or links differ'}"
        for name in new
        if new[name] != old.get(name)
    )


def main(arguments: list[str]) -> int:
    """Bring papers.csv up to date, or say what differs."""
    if arguments == ["--check"]:
        differing = changes()
        print("\n".join(differing) or f"{PAPERS.name} is what the seeds say")
        return int(bool(differing))
    write(merge(mentions(), read()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
