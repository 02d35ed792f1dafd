/** The text that a node shows once it has run: which LoRA it is, where a file was written. */

import { app } from "../../scripts/app.js"
import { addElement, after, make, makeRoom } from "./dom.js"

const NODES = new Set(["FaceLoRAApply", "FaceLoRAInspect", "FaceLoRASave", "FaceLoRAStylePack"])
const LETTER = 6.7, LINE = 15, MOST_LINES = 44 // in pixels; it scrolls where there are more

class ResultText {
  constructor(node) {
    this.node = node
    this.text = make("pre", "facelora-result-text")
    addElement(node, "result_text", make("div", "facelora-panel", this.text), () => this.height())
    after(node, "onExecuted", ({ text }) => this.show(text))
  }

  show(text = []) {
    this.text.textContent = text.join("\n")
    makeRoom(this.node)
  }

  height() {
    const text = this.text.textContent
    if (!text) return 0
    const columns = Math.max(10, Math.floor((this.node.size[0] - 40) / LETTER))
    const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0)
    return LINE * Math.min(lines, MOST_LINES) + 16
  }
}

const panels = new Set()

app.registerExtension({
  name: "facelora.result_text",
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return
    const shown = new ResultText(node)
    panels.add(shown)
    after(node, "onRemoved", () => panels.delete(shown))
  },
  /** The outputs of a workflow that is shown again. */
  onNodeOutputsUpdated(outputs) {
    for (const shown of panels) shown.show(outputs[shown.node.id]?.text)
  },
})
