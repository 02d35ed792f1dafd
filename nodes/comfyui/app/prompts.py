"""Prompts in ComfyUI's queue: what their graphs train, load and draw, and whose they are."""

# pyright: reportMissingImports=false

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from server import PromptServer

from nodes import NODE_CLASS_MAPPINGS  # pyright: ignore  # those of ComfyUI

from ....core.errors import BadPhoto, FaceLoraError
from ....core.pictures.style_pack import StyledPrompt
from ....core.storage.cache_folder import content_key
from ...settings import NodeStyles
from ..style_pack import NOT_VARIED, listed
from .dropped import input_folder, path_of
from .users import USER

LOAD_PHOTOS, TRAIN, LIKENESS = "FaceLoRALoadPhotos", "FaceLoRATrain", "FaceLoRALikeness"
STYLES = "FaceLoRAStylePack"


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was queued."""

    id: str
    graph: Mapping[str, Any]
    """ComfyUI's API format: the id of a node -> its class_type and inputs. All nodes have both."""
    extra: Mapping[str, Any]

    @classmethod
    def of(cls, item: Sequence[Any]) -> "Prompt":
        """Return the prompt of an item of ComfyUI's queue."""
        return cls(item[1], _nodes_in(item[2]), item[3])

    @property
    def user(self) -> str | None:
        """The user who queued it. It has none if another pack has put the prompt into the queue."""
        return self.extra.get(USER, None if args.multi_user else "default")

    @property
    def page(self) -> Mapping[str, Any] | None:
        """The graph of the page that has sent the prompt; None if no page has."""
        match self.extra:
            case {"extra_pnginfo": {"workflow": {"id": str()} as graph}}:
                return graph
        return None

    @property
    def workflow(self) -> str | None:
        """The id of that graph."""
        return self.page["id"] if self.page else None

    @property
    def training(self) -> str:
        """A hash of the user, Train Face LoRA and all that the node depends on; "" unless there is one such node.

        ComfyUI may reuse the training of any earlier prompt with the same hash: its cache ignores the ids of other nodes, too.
        """
        if len(trains := self.nodes_of(TRAIN)) != 1:
            return ""
        keys, nodes = list(trains), []
        for key in keys:  # which grows
            node, inputs = self.graph.get(key, {}), []
            for name, value in sorted(node.get("inputs", {}).items()):
                if _is_link(value):
                    keys += [value[0]] if value[0] not in keys else []
                    value = (keys.index(value[0]), value[1])
                inputs.append((name, value))
            nodes.append((node.get("class_type"), inputs))
        return content_key(self.user, trains[0], nodes)

    def nodes_of(self, kind: str) -> list[str]:
        """Return the ids of the nodes of a type."""
        return [key for key, node in self.graph.items() if node["class_type"] == kind]

    def saved(self, outputs: Mapping[str, Any], train: str) -> list[tuple[list[dict[str, Any]], set[tuple[str, int]]]]:
        """Return the pictures that each node has saved, and all that these depend on, if that includes the node `train`."""
        shown = {node: [one for one in output.get("images", ()) if _is_saved(one)] for node, output in outputs.items()}
        saved = [(images, links(self.graph, node)) for node, images in shown.items() if images]
        return [(images, sources) for images, sources in saved if train in {node for node, _ in sources}]

    def styles(self, nodes: Collection[str]) -> tuple[str, int, Sequence[StyledPrompt]]:
        """Return the pack, `vary` and the items of the one Headshot Style Pack among the nodes; no items if unknown."""
        match [self.graph[key]["inputs"] for key in self.nodes_of(STYLES) if key in nodes]:
            case [{"pack": str(pack), "styles": str(names), "count": int(count), "first_seed": int(seed)} as inputs]:
                vary, chosen = inputs.get("vary", NOT_VARIED), NodeStyles(pack, names, count, seed)
                with suppress(FaceLoraError):
                    return pack, vary, listed(chosen, vary, inputs.get("variation_seed", 0))
        return "", NOT_VARIED, ()


def running_prompts() -> list[Prompt]:
    return [Prompt.of(item) for item in list(PromptServer.instance.prompt_queue.currently_running.values())]


def running_prompt() -> Prompt:
    """Return the prompt whose nodes are executed now. It is the only one, because ComfyUI has one thread for them."""
    return running_prompts()[0]


def running_use(names: Sequence[str]) -> str:
    """Return the first of the names that is an input which the running node's first output goes to; the first if none is."""
    running, node = running_prompts(), get_executing_context()
    inputs = {
        name
        for one in (running[0].graph if running and node else {}).values()
        for name, value in one["inputs"].items()
        if one["class_type"] in (TRAIN, LIKENESS) and node and value == [node.node_id, 0]
    }
    return next((name for name in names if name in inputs), names[0])


def queued_photos() -> set[str]:
    """Return the photos and folders that running and waiting prompts load, by name below the input folder."""
    running, waiting = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    names, shown = set[str](), set[str]()
    for prompt in map(Prompt.of, (*running, *waiting)):
        for load in prompt.nodes_of(LOAD_PHOTOS):  # Its names may come from other nodes.
            for key in {load} | {source for source, _ in links(prompt.graph, load)}:
                texts = prompt.graph.get(key, {"inputs": {}})["inputs"].values()
                names |= {name.strip() for text in texts if isinstance(text, str) for name in text.splitlines()}
    for name in names:
        with suppress(BadPhoto):
            shown.add(path_of(name).relative_to(input_folder()).as_posix())
    return shown - {"."}


def waiting_runs(user: str | None) -> list[dict[str, Any]]:
    """Return what panels show of the user's training runs that are queued and have not begun: how many prompts are ahead."""
    running, queued = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    shown = []
    for ahead, item in enumerate(sorted(queued, key=itemgetter(0)), len(running)):
        prompt = Prompt.of(item)
        place = {"prompt": prompt.id, "workflow": prompt.workflow, "phase": "waiting", "ahead": ahead}
        shown += [place | {"node": key} for key in prompt.nodes_of(TRAIN) if user is not None and prompt.user == user]
    return shown


def aim(queued: Any) -> Any:
    """Remove a prompt's targets that other targets depend on, so that it is refused if none of those can be made.

    Train Face LoRA is a target itself. ComfyUI would run it, and leave out the headshots if their style is invalid.
    """
    if not isinstance(queued, dict) or "partial_execution_targets" in queued:
        return queued
    graph = _nodes_in(queued.get("prompt"))
    kinds = {key: NODE_CLASS_MAPPINGS.get(node["class_type"]) for key, node in graph.items()}
    outputs = {key for key, kind in kinds.items() if getattr(kind, "OUTPUT_NODE", False)}
    before = {source for key in outputs for source, _ in links(graph, key)}
    if any(graph[key]["class_type"] in (LOAD_PHOTOS, TRAIN) for key in outputs & before):
        queued["partial_execution_targets"] = sorted(outputs - before)
    return queued


def _nodes_in(graph: object) -> dict[str, Any]:
    """Return the nodes of a prompt that have a type, with inputs. ComfyUI only checks the nodes that it will run."""
    nodes = graph.items() if isinstance(graph, dict) else ()
    return {
        key: node if isinstance(node.get("inputs"), dict) else node | {"inputs": {}}
        for key, node in nodes
        if isinstance(node, dict) and isinstance(node.get("class_type"), str)
    }


def links(graph: Mapping[str, Any], key: str) -> set[tuple[str, int]]:
    """Return all that a node depends on: (id of a node, number of its output)."""
    sources: set[tuple[str, int]] = set()
    waiting, seen = [key], {key}
    while waiting:
        match graph.get(waiting.pop()):
            case {"inputs": dict(inputs)}:
                given = {(one[0], one[1]) for one in inputs.values() if _is_link(one)}
                sources |= given
                new = {source for source, _ in given} - seen
                waiting += new
                seen |= new
    return sources


def _is_link(value: object) -> bool:
    return isinstance(value, list) and [*map(type, value)] == [str, int]


def _is_saved(image: object) -> bool:
    match image:
        case {"type": "output", "filename": str(), "subfolder": str()}:
            return True
    return False
