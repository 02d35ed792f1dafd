"""Two users of a server with --multi-user: each sees and ends their own trainings and no others."""

import pytest

from tests.comfyui.graphs import training
from tests.comfyui.server import running_server
from tests.comfyui.test_train_node import ENDLESS, stop, training_state, wait_for
from tools.workflows import BUILD

from .page import ComfyPage, prepare
from .test_panel import STATUS, is_idle, status, train_node, wait_for_step

pytestmark = pytest.mark.slow

LISTEN = """() => {
    window.heard = []
    window.comfyAPI.api.api.addEventListener("facelora.training", ({ detail }) => window.heard.push(detail))
}"""


@pytest.fixture
def users(comfy_folder, tmp_path, site, browser):
    """The server as each of two users knows it, and the page of each, with the same graph in it."""
    for name in ("models/checkpoints", "input"):  # and no LoRAs: what was trained before is found
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(comfy_folder / name, target_is_directory=True)
    (tmp_path / "models" / "loras").mkdir()
    (tmp_path / "custom_nodes").mkdir()
    for pack in (comfy_folder / "custom_nodes").glob("*.py"):
        (tmp_path / "custom_nodes" / pack.name).symlink_to(pack)
    with running_server(tmp_path, "--multi-user") as server:
        servers, pages = [], []
        for name in ("anna", "berta"):
            user = server.post("/users", {"username": name})
            servers.append(server.as_user(user))
            prepare(servers[-1])
            pages.append(ComfyPage(browser, servers[-1], user=user))
            pages[-1].clear()
            pages[-1].run(LISTEN)
        pages[0].run(BUILD, train_node(seed=31, name="of-anna", samples=0, settings=""))
        pages[1].open(pages[0].saved(), "a file that anna gave to berta")  # with the ids of its graph and nodes
        pages[1].set_widgets({"FaceLoRATrain": {"name": "of-berta", "training_seed": 32}})
        yield servers, pages
        for page in pages:
            page.close()


def test_each_user_sees_and_ends_their_own_training_by_page_route_and_event(users):
    (anna, berta), (annas, bertas) = users
    assert annas.run("() => app.graph.id") == bertas.run("() => app.graph.id")
    prompt = annas.queue()
    wait_for_step(annas, 3)
    waiting = bertas.queue()
    assert annas.page.locator(".facelora-photos img").count() == 6

    # By page, route and event berta, and whoever says no name, learn nothing.
    bertas.reload()
    bertas.open(annas.saved(), "a file that anna gave to berta")
    bertas.run(LISTEN)
    (shown,) = anna.get("/facelora/training")
    wait_for_step(annas, shown["step"] + 3)
    assert is_idle(bertas)
    assert bertas.page.locator(".facelora-photos img").count() == 0
    assert bertas.run("() => window.heard") == []
    assert berta.get("/facelora/training") == []
    stranger = berta.as_user("nobody")
    assert stranger.get("/facelora/training") == []
    for other in (berta, stranger):
        named = {"prompt": prompt, "node": shown["node"]}
        assert "you have no training" in other.post("/facelora/stop", named)["error"]

    annas.page.click(".facelora-keep")
    assert anna.wait(prompt).status == "success"
    annas.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: of-anna')")

    # Then it is berta's turn, whose button ends hers.
    wait_for_step(bertas, 3)
    assert status(annas).startswith("done: of-anna")
    assert all(news["prompt"] == prompt for news in annas.run("() => window.heard"))
    assert all(news["prompt"] == waiting for news in bertas.run("() => window.heard"))
    bertas.page.click(".facelora-cancel")
    assert berta.wait(waiting).status == "interrupted"
    bertas.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('stopped')")


def test_cancelling_a_finished_training_does_not_end_another_users(users):
    (anna, berta), (annas, bertas) = users
    first = annas.queue()
    wait_for_step(annas, 3)
    second = berta.queue(training(name="next", steps=ENDLESS))
    annas.run("() => { window.pressed = document.querySelector('.facelora-cancel') }")
    anna.post("/interrupt", {"prompt_id": first})
    wait_for(lambda: training_state(berta).get("step", 0) >= 3, "berta's training")
    annas.run("() => window.pressed.click()")
    step = training_state(berta)["step"]
    wait_for(lambda: training_state(berta)["step"] >= step + 3, "berta's training to go on")
    assert [state["phase"] for state in anna.get("/facelora/training")] == ["stopped"]
    assert training_state(berta)["workflow"] is None, "sent by no page, and so shown on none"
    assert is_idle(bertas)
    stop(berta)
    assert berta.wait(second).status == "success"
