/** The settings of an app that most people leave alone, folded under "More". They are widgets of the graph's nodes. */

import { BASE_CHOSEN, addElement, remember, widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { spanText } from "./progress.js"
import { say } from "./words.js"

const TRAIN = "FaceLoRATrain", STYLES = "FaceLoRAStylePack", REDRAW = "FaceLoRARedraw"
/** The widgets, each with the type of its node. Without a widget's name, the node is switched on and off. */
const SETTINGS = [[TRAIN, "recipe"], ["FaceLoRAApply", "strength_model"], [STYLES, "extra"], [STYLES, "first_seed"],
  [REDRAW], ["FaceLoRALoadPhotos", "folder"], [TRAIN, "use"]]
const BYPASS = 4 // a node's mode in ComfyUI

export class More {
  /** `switched` is called when a node was switched on or off. */
  constructor(node, switched) {
    this.node = node
    this.switched = switched
    this.spans = {} // the least and the most seconds of each recipe
    this.rows = make("div", "facelora-settings")
    this.root = make("details", "facelora-more facelora-panel", make("summary", "", say("Recipe, strength, own words, seed")), this.rows)
    this.root.addEventListener("toggle", () => this.show())
    const widget = addElement(node, "more", this.root, () => 0)
    // The graph shows the widgets themselves, so the node gives this no room, nor a share of what is left.
    Object.assign(widget, { computeLayoutSize: undefined, computeSize: () => [0, -4] })
    document.addEventListener(BASE_CHOSEN, () => this.show())
  }

  /** Shows how long each recipe takes. */
  foresee(spans) {
    this.spans = spans
    this.show()
  }

  /** The nodes of the node's graph and of subgraphs in it. */
  nodes() {
    return (this.node.graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph?.nodes ?? [])])
  }

  /** Whether small faces are redrawn. */
  redraws() {
    return this.nodes().some(({ comfyClass, mode }) => comfyClass === REDRAW && mode === LiteGraph.ALWAYS)
  }

  show() {
    if (!this.root.open || this.root.contains(document.activeElement?.closest("input"))) return
    const nodes = this.nodes()
    this.rows.replaceChildren(...SETTINGS.flatMap(([type, name]) => {
      const node = nodes.find(({ comfyClass }) => comfyClass === type)
      return !node ? [] : [name ? this.row(node, widgetOf(node, name)) : this.toggle(node)]
    }))
  }

  /** A box to tick, which switches a node on that passes its input on else. */
  toggle(node) {
    const box = Object.assign(make("input", ""), { type: "checkbox", checked: node.mode === LiteGraph.ALWAYS })
    box.addEventListener("change", () => {
      node.mode = box.checked ? LiteGraph.ALWAYS : BYPASS
      remember(node)
      this.switched()
    })
    const label = make("label", "facelora-switch", box, make("span", "", say("Redraw small faces")))
    return Object.assign(label, { title: say("Draws small faces again at a larger size. A picture with one takes about a third longer.") })
  }

  row(node, widget) {
    const label = node.inputs?.find((input) => input.widget?.name === widget.name)?.label ?? widget.name
    const row = make("label", "", make("span", "", label), this.field(node, widget))
    if (widget.name !== "first_seed") return row
    const button = make("button", "", say("Other pictures"))
    button.addEventListener("click", () => {
      set(node, widget, widget.value + widgetOf(node, "count").value)
      this.show()
    })
    return make("div", "facelora-row", row, button)
  }

  /** An element that shows and sets a widget's value. */
  field(node, widget) {
    const { value, options } = widget, isNumber = typeof value === "number"
    const choice = (one) => Object.assign(make("option", "", this.text(widget, one)), { value: one })
    const field = Array.isArray(options.values)
      ? make("select", "", ...options.values.map(choice))
      : Object.assign(make("input", ""), {
        type: isNumber ? "number" : "text", step: options.step2 ?? 1, min: options.min, max: options.max, placeholder: options.placeholder ?? "",
      })
    field.value = value
    field.addEventListener("change", () => field.checkValidity() && set(node, widget, isNumber ? Number(field.value) : field.value))
    return field
  }

  text({ name, options }, value) {
    const span = name === "recipe" && this.spans[value], text = options.getOptionLabel?.(value) ?? value
    return span ? `${text} · ${spanText(span)}` : text
  }
}

function set(node, widget, value) {
  widget.value = value
  widget.callback?.(value)
  remember(node)
}
