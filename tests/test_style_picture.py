"""Schematic pictures of styles."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from core.pictures.style_pack import Style, Wording, find_style_packs
from tests.tooling import nodes_module

MODULE = nodes_module("style_picture", "nodes")
HEAD_SIZES, HEIGHT, UNKNOWN, style_picture = MODULE.HEAD_SIZES, MODULE.HEIGHT, MODULE.UNKNOWN, MODULE.style_picture


def style(prompt: str = "photo of {subject}", **fields) -> Style:
    return Style("A & B", "", {"tags": Wording(prompt)}, **fields)


def top(picture: str) -> tuple[int, ...]:
    """Red, green and blue at the top of the picture."""
    colour = re.findall(r'stop-color="#(\w{6})"', picture)[0]
    return tuple(bytes.fromhex(colour))


def test_a_picture_is_svg_in_the_styles_shape_with_its_name():
    root = ElementTree.fromstring(style_picture(style(aspect="3:2")))
    assert (int(root.attrib["width"]), int(root.attrib["height"])) == (HEIGHT * 3 // 2, HEIGHT)
    assert root[0].text == "A & B"


def test_a_name_that_xml_cannot_hold_still_gives_a_picture():
    assert ElementTree.fromstring(style_picture(replace(style(), name="A \x01 \ufffe")))[0].text == "A \ufffd \ufffd"


def test_a_closer_framing_shows_a_larger_head():
    def head(framing):
        return float(re.findall(r'ry="([\d.]+)"', style_picture(style(framing=framing)))[0])

    sizes = [head(framing) for framing in HEAD_SIZES]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("prompt", "background", "darkest", "brightest"),
    [
        ("{subject}, pure white background", None, 220, 255),
        ("{subject}, {background}", "a plain black backdrop", 0, 40),
        ("black and white photo of {subject}, black background", None, 0, 40),
    ],
)
def test_the_backdrop_that_is_said_is_drawn(prompt, background, darkest, brightest):
    axes = {"background": (background,)} if background else {}
    assert all(darkest <= level <= brightest for level in top(style_picture(style(prompt, axes=axes))))


def test_black_and_white_has_no_colours():
    picture = style_picture(style("black and white photo of {subject} in a brick loft"))
    assert len(set(top(picture))) == 1
    assert len(set(top(style_picture(style("photo of {subject} in a brick loft"))))) == 3


def test_the_shipped_styles_are_understood():
    shipped = [style for pack in find_style_packs().packs.values() for style in pack.styles]
    assert [style.name for style in shipped if UNKNOWN[0] in style_picture(style)] == []
    assert UNKNOWN[0] in style_picture(style("{subject} in limbo"))
