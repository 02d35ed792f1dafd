"""Style packs: the shipped ones, bad ones, and the prompts they make."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import BadConfig, BadStylePack, UnknownFamily
from core.models.clip import load_tokenizer
from core.pictures.sizes import size_near
from core.pictures.style_pack import (
    FAMILY_DEFAULTS,
    PACKAGE_FOLDER,
    PLACEHOLDER,
    Style,
    Subject,
    Wording,
    find_style_packs,
    long_prompts,
    read_style_pack,
)

SCHEMA = json.loads((PACKAGE_FOLDER / "style_pack.schema.json").read_text("utf-8"))
SHIPPED = find_style_packs()
SUBJECT = Subject("sks", "person")


def good_style(**changes) -> dict:
    style = {
        "name": "Plain",
        "category": "Studio",
        "framing": "chest-up",
        "aspect": "4:5",
        "strength": 0.9,
        "prompts": {
            "tags": {"prompt": "photo of {subject}, {light}", "negative": "blurry", "guidance": 6.5, "steps": 25},
            "sentences": {"prompt": "A {framing} photograph of {subject}, lit by {light}."},
        },
        "axes": {"light": ["window light", "lamplight"]},
        "picture": "plain.jpg",
    }
    return {**style, **changes}


def good_pack(*styles: dict, **changes) -> dict:
    pack = {"id": "mine", "title": "Mine", "version": "1.0", "licence": "CC0-1.0"}
    return {**pack, "styles": list(styles) or [good_style()], **changes}


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), "utf-8")
    return path


def tags(text: str, **more) -> dict:
    return {"prompts": {"tags": {"prompt": text, **more}}, "axes": {}}


@pytest.fixture(scope="module")
def count_tokens() -> Callable[[str], int]:
    tokenizer = load_tokenizer()
    return lambda text: len(tokenizer(text).input_ids)


# The shipped packs


def test_at_least_six_packs_of_ten_uniquely_named_styles_ship():
    assert SHIPPED.problems == ()
    assert len(SHIPPED.packs) >= 6
    assert {name: len(pack.styles) for name, pack in SHIPPED.packs.items() if len(pack.styles) != 10} == {}
    assert max(Counter(name for pack in SHIPPED.packs.values() for name in pack.names).values()) == 1
    assert {f"{pack_id}.json" for pack_id in SHIPPED.packs} | {"style_pack.schema.json"} == {
        path.name for path in PACKAGE_FOLDER.iterdir()
    }


@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_every_shipped_style_renders_for_both_kinds_of_family(family: str):
    reads_tags = FAMILY_DEFAULTS[family].wording == "tags"
    for pack in SHIPPED.packs.values():
        prompts = pack.prompts(SUBJECT, family, 40, seed=1)
        assert {prompt.style for prompt in prompts} == set(pack.names)
        for prompt in prompts:
            assert "sks person" in prompt.prompt
            assert not re.search(r"[{}]|  |, ,|\.\.| \.| ,", prompt.prompt)
            assert bool(prompt.negative) == reads_tags
            assert prompt.prompt.endswith(".") != reads_tags


def test_each_family_has_sizes_that_it_can_draw():
    for family, defaults in FAMILY_DEFAULTS.items():
        for prompt in SHIPPED.pick("outdoor").prompts(SUBJECT, family, 10, seed=1):
            assert prompt.width % defaults.size_multiple == prompt.height % defaults.size_multiple == 0


def test_shipped_styles_keep_to_the_rules_of_a_style_pack(count_tokens):
    """Prompts fit one CLIP chunk with a long trigger word, and mention no gender, age or beauty."""
    subject = Subject("zkq_annamaria", "person")
    assert count_tokens(str(subject)) - 2 == 8  # "sks person" has two
    unwelcome = (
        r"\b(he|she|his|her|him|hers|man|woman|men|women|male|female|boy|girl|lady|guy|young|old|elderly|aged|youthful"
        r"|beautiful|handsome|pretty|attractive|sexy|slim|thin|fat|ugly|deformed|flawless|perfect|smooth skin|pale skin"
        r"|fair|wrinkles|makeup|beard|hair|glasses)\b"
    )
    allowed = r"old (university|stone|plaster|brick)|of old buildings|serious and fair|with old buildings"
    for style in (style for pack in SHIPPED.packs.values() for style in pack.styles):
        assert style.tags is not None and style.sentences is not None
        longest = {axis: max(values, key=count_tokens) for axis, values in style.axes.items()}
        longest |= {"subject": str(subject), "framing": style.framing}
        prompt = PLACEHOLDER.sub(lambda match, texts=longest: texts[match[1]], style.tags.prompt)
        assert count_tokens(prompt) <= 77, style.name
        assert count_tokens(style.tags.negative) <= 40, style.name
        texts = [style.tags.prompt, style.tags.negative, style.sentences.prompt]
        texts += [value for values in style.axes.values() for value in values]
        for text in texts:
            assert not re.search(unwelcome, re.sub(allowed, "", text), re.IGNORECASE), (style.name, text)
        assert re.search(r"skin texture|visible pores|sharp eyes", style.tags.prompt), style.name
        assert "plastic skin" in style.tags.negative, style.name
        assert {"expression", "outfit", "light"} <= set(style.axes), style.name
        assert all(len(values) >= 2 for values in style.axes.values()), style.name


# The schema


def documents() -> dict[str, Any]:
    """Good packs and packs with one fault that the schema can express."""
    second_subject = {"axes": {"subject_two": ["a dog", "a cat"]}}
    return {
        "only what is required": good_pack({"name": "a", "prompts": {"sentences": {"prompt": "{subject}"}}}),
        "a schema for editors": good_pack(**{"$schema": "style_pack.schema.json"}),
        "whole float steps": good_pack(good_style(**tags("{subject}", steps=30.0))),
        "no steps at all": good_pack(good_style(**tags("{subject}", steps=0))),
        "too much guidance": good_pack(good_style(**tags("{subject}", guidance=31))),
        "an unknown wording field": good_pack(good_style(**tags("{subject}", sampler="x"))),
        "an unknown wording": good_pack(good_style(prompts={"emoji": {"prompt": "{subject}"}})),
        "no wording": good_pack(good_style(prompts={})),
        "an unknown aspect": good_pack(good_style(aspect="5:7")),
        "a style without a name": good_pack({"prompts": {"tags": {"prompt": "{subject}"}}}),
        "a style that is a text": good_pack(styles=["Plain"]),
        "an axis value twice": good_pack(good_style(axes={"light": ["a", "b", "a"]})),
        "an axis value with braces": good_pack(good_style(axes={"light": ["{subject}"]})),
        "an axis called subject": good_pack(good_style(axes={"subject": ["x"]})),
        "an axis called subject_two": good_pack({**good_style(**tags("{subject} {subject_two}")), **second_subject}),
        "an axis name with a line end": good_pack(good_style(axes={"light\n": ["x"]})),
        "a picture in a folder": good_pack(good_style(picture="pictures/plain.webp")),
        **{f"picture {name!r}": good_pack(good_style(picture=name)) for name in PATH_TRICKS},
        "no styles": good_pack(styles=[]),
        "an id with a slash": good_pack(id="../mine"),
        "an id with a line end": good_pack(id="mine\n"),
        "a version with letters": good_pack(version="v1"),
        "an unknown pack field": good_pack(author="x"),
        **{f"no {name}": {k: v for k, v in good_pack().items() if k != name} for name in good_pack()},
        "null": None,
        "a styler list": [{"name": "base", "prompt": "{prompt}", "negative_prompt": ""}],
        "a styler list with other fields": [{"name": "base", "prompt": "a {prompt}", "author": "x"}],
        "a styler style without a place for the prompt": [{"name": "base", "prompt": "x"}],
        "an empty styler list": [],
    }


PATH_TRICKS = [
    "pictures/../../secret.jpg",
    "/etc/secret.jpg",
    "C:secret.jpg",
    "\\\\server\\share\\secret.jpg",
    "..\\secret.jpg",
    "~/secret.jpg",
    ".hidden.jpg",
    "null\x00byte.jpg",
    "plain.svg",
    "plain.jpg\n",
    "https://example.org/a.jpg",
    "",
]


def test_the_published_schema_has_the_defaults_of_a_style():
    stated = {
        name: kind["default"] for name, kind in SCHEMA["$defs"]["style"]["properties"].items() if "default" in kind
    }
    assert "strength" in stated
    assert stated == {item.name: item.default for item in fields(Style) if item.name in stated}


def test_our_own_checks_and_the_published_schema_agree(tmp_path):
    """With jsonschema, an implementation by others, as the judge."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    judge = jsonschema.Draft202012Validator(SCHEMA)
    for pack_id in SHIPPED.packs:
        judge.validate(json.loads((PACKAGE_FOLDER / f"{pack_id}.json").read_text("utf-8")))
    for name, document in documents().items():
        try:
            _, problems = read_style_pack(write(tmp_path / "pack.json", document))
        except BadStylePack as error:
            problems = (str(error),)
        assert (problems == ()) == judge.is_valid(document), (name, problems)


# Bad styles and bad files


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"strength": 3}, "strength = 3: must be between 0 and 2"),
        ({"strength": True}, "strength = True: expected float"),
        ({"framing": "passport"}, "framing = 'passport': choose one of close-up, head-and-shoulders"),
        ({"negtive": "x"}, "unknown field 'negtive'; known: name, category"),
        ({"axes": {"light": "sun"}}, "axes: light = 'sun': expected a list"),
        ({"axes": {"light": ["a"], "pose": ["b"]}}, "axes: pose: no prompt contains {pose}"),
        ({"picture": "../x.jpg"}, "picture = '../x.jpg': expected the relative name of a jpg, png or webp file"),
        (tags("photo"), "prompts: tags.prompt = 'photo': expected a text containing {subject}"),
        (
            tags("{subject} {hat}"),
            "prompts: tags.prompt: unknown placeholder {hat}; known: {subject}, {framing}",
        ),
        (tags("{subject} {subject.__class__}"), "unknown placeholder {subject.__class__}"),
        (tags("{subject} {"), "prompts: tags.prompt: an unmatched brace"),
        (tags("{subject}", negative="}{"), "prompts: tags.negative: an unmatched brace"),
        (tags("{subject}", steps=2.5), "prompts: tags.steps = 2.5: must be a whole number"),
        ({"name": "GOOD"}, "name: another style of this pack has the same name"),
        ({"name": 7}, "name = 7: expected str"),
        ({"name": "half \ud83d"}, r"name = 'half \ud83d': contains an invalid character (an unpaired surrogate)"),
        (
            tags("{subject} \ud83d"),
            r"prompts: tags.prompt = '{subject} \ud83d': contains an invalid character (an unpaired surrogate)",
        ),
        ({"name": "Wall, red"}, "name = 'Wall, red': expected a name without commas, which separate styles"),
        (
            {"name": " Wall"},
            "name = ' Wall': expected a name without commas, which separate styles, and without spaces",
        ),
    ],
)
def test_a_bad_style_is_named_and_the_good_ones_load(change, expected, tmp_path):
    bad = good_style(**{"name": "Bad", **change})
    path = write(tmp_path / "my pack.json", good_pack(good_style(name="Good"), bad, good_style(name="Last")))
    pack, problems = read_style_pack(path)
    assert pack.names == ["Good", "Last"]
    label = repr(bad["name"]) if isinstance(bad["name"], str) else "number 2"
    assert len(problems) == 1
    assert problems[0].startswith(f"my pack.json: style {label}: ")
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"id": "mine",', "bad.json: not JSON: .* \\(line 1, column 15\\)"),
        (b'{"id": NaN}', "bad.json: the field .title. is missing"),
        (b'"pack"', "bad.json: 'pack': expected a table"),
        (b"[]", "bad.json: styles: is empty"),
        (b"{}", "bad.json: the field 'id' is missing; the field 'title' is missing"),
        (b"[" + b" " * 5 * 2**20 + b"]", "bad.json: the file is larger than 5 MiB, the maximum"),
    ],
)
def test_a_file_that_is_no_pack_gets_one_clear_line(content, expected, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(BadStylePack, match=f"^{expected}") as caught:
        read_style_pack(path)
    assert "\n" not in str(caught.value)


def test_a_pack_whose_styles_are_all_bad_says_why(tmp_path):
    path = write(tmp_path / "mine.json", good_pack(good_style(strength=9), good_style(name="B", strength=8)))
    with pytest.raises(BadStylePack, match=r"mine.json: style 'Plain': strength = 9.*no style .* problems: 2"):
        read_style_pack(path)


# Each example writes a file, which may take long on a machine that has other work.
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["id", "styles", "name", "prompts", "axes", "tags", "prompt"]), inner)
        ),
        max_leaves=12,
    )
)
def test_whatever_stands_where_a_style_should_be_costs_only_itself(tmp_path_factory, junk):
    path = write(tmp_path_factory.mktemp("fuzz") / "mine.json", good_pack(good_style(), junk))
    pack, problems = read_style_pack(path)
    assert pack.names == ["Plain"]
    assert problems and all(problem.startswith("mine.json: style ") for problem in problems)


def test_the_example_in_the_docs_is_a_good_pack(tmp_path):
    docs = Path(__file__).parents[2] / "docs" / "style-packs.md"
    (example,) = re.findall(r"```json\n(.*?)```", docs.read_text("utf-8"), re.DOTALL)
    (tmp_path / "a.json").write_text(example, "utf-8")
    assert read_style_pack(tmp_path / "a.json")[1] == ()


# Pictures


def test_the_picture_of_a_style_is_found_beside_the_pack(tmp_path):
    (tmp_path / "pictures").mkdir()
    pack, problems = read_style_pack(write(tmp_path / "a.json", good_pack(good_style(picture="pictures/plain.jpg"))))
    assert problems == () and pack.picture(pack.styles[0]) is None
    (tmp_path / "pictures" / "plain.jpg").write_bytes(b"x")
    assert pack.picture(pack.styles[0]) == (tmp_path / "pictures" / "plain.jpg").resolve()


@pytest.mark.parametrize("name", ["a" * 300 + ".jpg", "loop.jpg"])
def test_a_picture_that_cannot_be_looked_up_is_named(name, tmp_path):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    pack, _ = read_style_pack(write(tmp_path / "a.json", good_pack(good_style(picture=name))))
    try:
        assert pack.picture(pack.styles[0]) is None  # newer versions of Python raise nothing
    except BadStylePack as error:
        assert "cannot be resolved" in str(error)


def test_a_link_out_of_the_packs_folder_is_refused(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"x")
    folder = tmp_path / "packs"
    folder.mkdir()
    (folder / "plain.jpg").symlink_to(secret)
    pack, _ = read_style_pack(write(folder / "a.json", good_pack()))
    with pytest.raises(BadStylePack, match=r"'plain\.jpg' leads out of the folder"):
        pack.picture(pack.styles[0])


# The list of sdxl_prompt_styler


def test_a_list_of_sdxl_prompt_styler_is_read_as_it_is(tmp_path):
    # The example in the README of twri/sdxl_prompt_styler.
    styler = [
        {"name": "base", "prompt": "{prompt}", "negative_prompt": ""},
        {
            "name": "enhance",
            "prompt": "breathtaking {prompt} . award-winning, professional, highly detailed",
            "negative_prompt": "ugly, deformed, noisy, blurry, distorted, grainy",
        },
    ]
    pack, problems = read_style_pack(write(tmp_path / "sdxl styles.json", styler))
    assert problems == () and pack.id == "sdxl styles" and pack.names == ["base", "enhance"]
    (enhanced,) = pack.prompts(SUBJECT, "sdxl", 1, seed=0, styles=["enhance"])
    assert enhanced.prompt == (
        "breathtaking head-and-shoulders portrait of sks person . award-winning, professional, highly detailed"
    )
    assert enhanced.negative == "ugly, deformed, noisy, blurry, distorted, grainy"


def test_bad_entries_of_a_styler_list_are_named_and_the_others_load(tmp_path):
    styler = [
        {"name": "base", "prompt": "{prompt}"},
        {"name": "only negative", "negative_prompt": "x"},
        {"name": "typo", "prompt": "{prompt} {promt}", "negative_prompt": ""},
        {"name": "base", "prompt": "again {prompt}"},
    ]
    pack, problems = read_style_pack(write(tmp_path / "s.json", styler))
    assert pack.names == ["base"]
    assert problems == (
        "s.json: style 'only negative': the field 'prompt' is missing",
        "s.json: style 'typo': prompt: unknown placeholder {promt}; known: {prompt}",
        "s.json: style 'base': name: another style of this pack has the same name",
    )


# Finding packs


def test_a_users_pack_replaces_the_shipped_one_at_once(tmp_path):
    assert find_style_packs([tmp_path]).pick("corporate").title == "Corporate"
    write(tmp_path / "any name.json", good_pack(id="corporate", title="Our house"))
    assert find_style_packs([tmp_path]).pick("corporate").title == "Our house"
    write(tmp_path / "any name.json", good_pack(id="corporate", title="Our new house"))
    assert find_style_packs([tmp_path]).pick("corporate").title == "Our new house"


def test_two_files_with_one_id_are_an_error_that_names_both(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write(folder / "p.json", good_pack(id="corporate"))
    found = find_style_packs(folders)
    assert len(found.problems) == 1
    with pytest.raises(BadStylePack, match=r"'corporate' is used by several files; keep one: .*a.p\.json, .*b.p\.json"):
        found.pick("corporate")
    assert found.pick("outdoor").title == "Outdoor"


def test_a_folder_named_twice_is_read_once(tmp_path):
    write(tmp_path / "p.json", good_pack())
    assert find_style_packs([tmp_path, str(tmp_path) + "/."]).pick("mine").title == "Mine"


def test_bad_files_and_missing_folders_are_reported(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    write(tmp_path / "half.json", good_pack(good_style(), good_style(name="Bad", strength=9)))
    found = find_style_packs([tmp_path, tmp_path / "nowhere"])
    assert found.pick("mine").names == ["Plain"]
    assert set(found.packs) == {*SHIPPED.packs, "mine"}
    assert [re.sub(r"^.*nowhere", "nowhere", problem)[:25] for problem in found.problems] == [
        "broken.json: not JSON: Ex",
        "half.json: style 'Bad': s",
        "nowhere: this folder of s",
    ]


def test_a_pack_in_the_place_of_its_folder_is_not_said_to_be_missing(tmp_path):
    write(tmp_path / "mine.json", good_pack(good_style()))
    (problem,) = find_style_packs([tmp_path / "mine.json"]).problems
    assert problem.endswith("mine.json: this folder of style packs is a file; give the folder that it is in")


# Expansion


def test_the_list_stays_the_same_in_later_versions(tmp_path):
    """A batch that was interrupted before an update goes on with the pictures that are missing, not with others."""
    pack, _ = read_style_pack(write(tmp_path / "a.json", good_pack(good_style(), good_style(name="Other"))))
    prompts = pack.prompts(SUBJECT, "sd15", 6, seed=42)
    assert prompts == pack.prompts(SUBJECT, "sd15", 6, seed=42) != pack.prompts(SUBJECT, "sd15", 6, seed=43)
    assert [(p.style, p.prompt.removeprefix("photo of sks person, ")) for p in prompts] == [
        ("Plain", "window light"),
        ("Other", "window light"),
        ("Plain", "lamplight"),
        ("Other", "lamplight"),
        ("Plain", "window light"),
        ("Other", "lamplight"),
    ]


@pytest.mark.parametrize("pack_id", ["corporate", "outdoor"])
def test_styles_and_axis_values_are_used_equally_often(pack_id: str):
    pack = SHIPPED.pick(pack_id)
    # The same styles with prompts that are only a list of the values.
    listed = [replace(s, prompts={"tags": Wording("{" + "}|{".join(s.axes) + "}")}) for s in pack.styles[:4]]
    prompts = replace(pack, styles=tuple(listed)).prompts(SUBJECT, "sdxl", 40, seed=3)
    assert Counter(prompt.style for prompt in prompts) == dict.fromkeys(pack.names[:4], 10)
    for style in listed:
        drawn = zip(*(prompt.prompt.split("|") for prompt in prompts if prompt.style == style.name), strict=True)
        for texts, values in zip(drawn, style.axes.values(), strict=True):
            uses = Counter(texts)
            assert set(uses) == set(values)
            assert set(uses.values()) <= {10 // len(values), -(-10 // len(values))}


@given(count=st.integers(1, 60), more=st.integers(0, 40), seed=st.integers(0, 2**64 - 1))
def test_a_longer_list_starts_with_the_shorter_one(count, more, seed):
    pack = SHIPPED.pick("outdoor")
    longer = pack.prompts(SUBJECT, "flux1", count + more, seed)
    assert longer[:count] == pack.prompts(SUBJECT, "flux1", count, seed)
    uses = Counter(prompt.style for prompt in longer)
    assert max(uses.values()) - min(uses[name] for name in pack.names) <= 1


def test_no_two_pictures_of_a_list_have_the_same_seed():
    seeds = [prompt.seed for prompt in SHIPPED.pick("corporate").prompts(SUBJECT, "sdxl", 50, seed=2**64 - 3)]
    assert len(set(seeds)) == 50 and max(seeds) < 2**64 and seeds[:4] == [2**64 - 3, 2**64 - 2, 2**64 - 1, 0]


def test_styles_are_chosen_by_name_in_any_case():
    prompts = SHIPPED.pick("outdoor").prompts(SUBJECT, "sdxl", 4, seed=0, styles=["seaside", "Seaside", "CITY STREET"])
    assert Counter(prompt.style for prompt in prompts) == {"Seaside": 2, "City street": 2}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"styles": []}, "styles: must not be empty; style pack 'outdoor' has: Park"),
        ({"subject": Subject("", " ")}, "the subject is empty"),
        ({"resolution": 32}, "resolution = 32: must be at least 64 for sdxl"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, expected):
    with pytest.raises(BadConfig, match=expected):
        SHIPPED.pick("outdoor").prompts(**{"subject": SUBJECT, "family": "sdxl", "count": 1, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("pack", "family", "style", "said"),
    [
        ("corprate", "sdxl", None, "no style pack 'corprate'; choose one of: black-and-white, care-science-law"),
        ("outdoor", "sdxl", "Moon", "'outdoor' has no style 'Moon'; choose one of: Park in open shade, Golden hour"),
        ("outdoor", "sd1", "Golden hour", "the family 'sd1'; choose one of: sd15, sdxl, sd3, flux1"),
    ],
)
def test_an_unknown_pack_style_or_family_lists_the_choices(pack, family, style, said):
    with pytest.raises((BadStylePack, UnknownFamily), match=said):
        SHIPPED.pick(pack).prompts(SUBJECT, family, 1, seed=0, styles=[style])


@pytest.mark.parametrize(
    ("family", "prompt", "negative", "guidance", "steps", "size"),
    [
        ("sdxl", "photo of sks person, window light", "blurry", 6.5, 25, (896, 1152)),
        ("flux1", "A chest-up photograph of sks person, lit by window light.", "", 3.5, 28, (912, 1136)),
    ],
)
def test_each_kind_of_family_gets_its_own_wording_and_numbers(
    family, prompt, negative, guidance, steps, size, tmp_path
):
    style = good_style(axes={"light": ["window light"]})
    pack, _ = read_style_pack(write(tmp_path / "a.json", good_pack(style)))
    (made,) = pack.prompts(SUBJECT, family, 1, seed=5)
    assert (made.prompt, made.negative, made.guidance, made.steps) == (prompt, negative, guidance, steps)
    assert (made.width, made.height) == size
    assert (made.style, made.seed, made.strength) == ("Plain", 5, 0.9)


def test_a_missing_wording_borrows_only_the_others_prompt(tmp_path):
    pack, _ = read_style_pack(
        write(tmp_path / "a.json", good_pack(good_style(**tags("photo of {subject}", negative="x", guidance=9))))
    )
    (made,) = pack.prompts(SUBJECT, "flux1", 1, seed=0)
    assert (made.prompt, made.negative, made.guidance) == ("photo of sks person", "", 3.5)


def test_braces_in_a_trigger_word_are_only_text():
    (made,) = SHIPPED.pick("outdoor").prompts(Subject("{light}", "person"), "sdxl", 1, seed=0)
    assert "{light} person" in made.prompt


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("1:1", (1024, 1024)),
        ("4:5", (896, 1152)),
        ("3:4", (896, 1152)),
        ("2:3", (832, 1216)),
        ("3:2", (1216, 832)),
        ("9:16", (768, 1344)),
        ("16:9", (1344, 768)),
    ],
)
def test_sizes_at_1024_are_those_that_sdxl_was_trained_on(aspect, size):
    # The list of training sizes in appendix I of the SDXL paper, arXiv:2307.01952.
    assert size_near(aspect, 1024, 64) == size


def test_a_very_narrow_picture_is_one_multiple_wide():
    assert size_near("1:300", 512, 64) == (64, 4096)


@given(
    st.sampled_from(["1:1", "4:5", "5:4", "3:4", "4:3", "2:3", "3:2", "9:16", "16:9"]),
    st.integers(64, 2048),
    st.sampled_from([16, 64]),
)
def test_a_size_has_at_most_the_asked_area_and_the_right_shape(aspect, resolution, multiple):
    width, height = size_near(aspect, resolution, multiple)
    across, down = map(int, aspect.split(":"))
    assert width % multiple == height % multiple == 0
    assert 0 < width * height <= resolution**2
    assert (width < height) <= (across < down) and (width > height) <= (across > down)
    assert across != down or width == height


# Token limits


def test_clip_counts_start_and_end(count_tokens):
    # The ids of this text in the CLIP tokenizer test of elixir-nx/bumblebee, which reads the vocabulary itself.
    assert load_tokenizer()("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert count_tokens("a photo of a cat") == 7


def test_a_prompt_over_the_limit_is_reported_with_its_style(count_tokens, tmp_path):
    style = good_style(**tags("{subject}" + ", a red apple" * 30, negative="blurry"))
    pack, _ = read_style_pack(write(tmp_path / "a.json", good_pack(style)))
    prompts = pack.prompts(SUBJECT, "sdxl", 3, seed=0)
    assert long_prompts(prompts, count_tokens) == [
        "style 'Plain': the prompt has 124 tokens, 47 over the 77 of one chunk"
    ]
    assert long_prompts(SHIPPED.pick("corporate").prompts(SUBJECT, "sdxl", 40, seed=0), count_tokens) == []
