/** The styles of Headshot Style Pack as pictures to choose from: the person's own headshots, where there are some. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { PERSON_SHOWN, addElement, after, comesFrom, makeRoom, whenChanged, widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { sayName } from "./words.js"

const NODE = "FaceLoRAStylePack"
const HEIGHT = 271 // in pixels: three whole rows

class StylePicker {
  constructor(node) {
    this.node = node
    this.pack = widgetOf(node, "pack")
    this.styles = widgetOf(node, "styles")
    this.grid = make("div", "facelora-styles")
    addElement(node, "picker", make("div", "facelora-panel", this.grid), () => HEIGHT)
    this.own = {} // the address of the person's headshot, by style
    const shown = ({ detail: { train, person } }) => comesFrom(node, train) && this.showPerson(person)
    document.addEventListener(PERSON_SHOWN, shown)
    after(node, "onRemoved", () => document.removeEventListener(PERSON_SHOWN, shown))
    whenChanged(node, this.pack, () => this.load())
    whenChanged(node, this.styles, () => this.mark())
    this.load()
    makeRoom(node)
  }

  get chosen() {
    return this.styles.value.split(",").map((name) => name.trim()).filter(Boolean)
  }

  async load() {
    const pack = this.pack.value
    if (pack === this.shown) return this.mark()
    this.shown = pack
    const answer = await api.fetchApi(`/facelora/styles?pack=${encodeURIComponent(pack)}`)
    const names = answer.ok ? await answer.json() : []
    if (pack !== this.shown) return
    if (answer.ok) this.keep(names)
    this.grid.replaceChildren(...names.map((name) => this.card(name)))
    this.mark()
  }

  /** Shows the headshots of a person, by the key of their record; the pack's own pictures of nobody. */
  async showPerson(person) {
    this.person = person
    const answer = person && await api.fetchApi(`/facelora/people/${person}/styles`)
    const listed = answer?.ok ? await answer.json() : []
    if (person !== this.person) return
    this.own = Object.fromEntries(listed.map(({ pack, style, name }) => {
      const [filename, ...folders] = name.split("/").reverse(), subfolder = folders.reverse().join("/")
      return [`${pack}/${style}`, api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type: "output", preview: "webp;80" })}`)]
    }))
    for (const card of this.grid.children) card.querySelector("img").src = this.address(card.dataset.name)
  }

  /** The address of a style's picture. */
  address(name) {
    const pack = this.shown
    return this.own[`${pack}/${name}`] ?? api.apiURL(`/facelora/style?pack=${encodeURIComponent(pack)}&style=${encodeURIComponent(name)}`)
  }

  /** Removes styles that were chosen in another pack. */
  keep(names) {
    const { chosen } = this
    const kept = chosen.filter((name) => names.some((other) => same(name, other)))
    if (kept.length < chosen.length) this.styles.value = kept.join(", ")
  }

  card(name) {
    const picture = Object.assign(make("img", ""), { src: this.address(name), alt: "" })
    const card = make("button", "facelora-style", picture, make("span", "", sayName(name)))
    card.title = sayName(card.dataset.name = name)
    card.addEventListener("click", () => this.toggle(name))
    return card
  }

  toggle(name) {
    const { chosen } = this
    const others = chosen.filter((other) => !same(other, name))
    this.styles.value = (others.length < chosen.length ? others : [...chosen, name]).join(", ")
    this.mark()
    this.node.graph?.change?.()
  }

  /** Marks the chosen styles; all of them if none is named. */
  mark() {
    const { chosen } = this
    for (const card of this.grid.children) {
      const named = chosen.some((name) => same(name, card.dataset.name))
      card.setAttribute("aria-pressed", named)
      card.classList.toggle("facelora-dim", chosen.length > 0 && !named)
    }
  }
}

const same = (one, other) => one.toLowerCase() === other.toLowerCase()

app.registerExtension({
  name: "facelora.stylePicker",
  nodeCreated(node) {
    if (node.comfyClass === NODE) new StylePicker(node)
  },
})
