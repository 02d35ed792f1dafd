/** Tiles of photos and headshots, and dropped files, on pages of every interface. Nothing here needs ComfyUI. */

import { enlargeable, make } from "./elements.js"
import { say, saySentence } from "./words.js"

const VERDICTS = { "the same person": "good", perhaps: "doubtful", "someone else": "rejected" }
// say
const WORDS = { good: "✓ good", doubtful: "! check", rejected: "✕ left out" }

/** The dropped file, or the files of a dropped folder. */
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))]
  const reader = entry.createReader(), inside = []
  for (let more = [null]; more.length; inside.push(...more))
    more = await new Promise((done, failed) => reader.readEntries(done, failed))
  return (await Promise.all(inside.map(filesOf))).flat()
}

/** All dropped files. The entries exist only until the event ends. */
export async function dropped({ items, files }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean)
  return entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(filesOf))).flat() : [...files]
}

export const isNoise = ({ name }) => name.startsWith(".") || /^(thumbs\.db|desktop\.ini)$/i.test(name) // of a dropped folder

/**
 * A photo with its verdict. `address` is a promise of its address, `photo` what the check says of it, and `remove` what a button
 * does; without it there is no button.
 */
export function photoTile(address, own, photo, remove, caption) {
  const image = make("img", "")
  address.then((src) => (image.src = src))
  const word = photo?.person ? say("person {}", photo.person) : say(WORDS[photo?.verdict] ?? "")
  const verdict = photo?.person ? "rejected" : photo?.verdict ?? "unknown"
  const tile = make("div", `facelora-tile facelora-${verdict} ${photo?.person ? "facelora-person-of" : ""}`, image, make("span", "facelora-word", word))
  const reason = saySentence(photo?.reason)
  image.alt = [own, word, reason].filter(Boolean).join(say(", "))
  tile.title = [own, reason, caption].filter(Boolean).join("\n")
  enlargeable(image, (copy) => make("figure", "", copy, make("figcaption", "", `${word} ${tile.title}`)))
  if (!remove) return tile
  const button = make("button", "", "×")
  button.title = say("Remove {}", own)
  button.addEventListener("click", remove)
  tile.append(button)
  return tile
}

/** A headshot with its likeness to the person, if that is known, and buttons. The title has the likeness in words. */
export function headshotTile(src, name, score, [someoneElse, samePerson] = [], buttons = []) {
  const image = enlargeable(Object.assign(make("img", ""), { src, alt: name, loading: "lazy" }))
  if (score == null) return make("div", "facelora-headshot", image, ...buttons)
  const word = score >= samePerson ? "the same person" : score >= someoneElse ? "perhaps" : "someone else"
  const shown = make("div", `facelora-headshot facelora-${VERDICTS[word]}`, image,
    make("span", "facelora-word", score < 0 ? say("no face") : score.toFixed(2)))
  shown.title = score < 0 ? say("no face") : say("likeness {}: {}", score.toFixed(2), say(word))
  image.alt += say(", ") + shown.title
  shown.append(...buttons)
  return shown
}

/** A button for more pictures like one. */
export function moreLike(draw) {
  const button = Object.assign(make("button", "", "≈"), { title: say("More like this one") })
  button.setAttribute("aria-label", button.title)
  button.addEventListener("click", draw)
  return button
}
