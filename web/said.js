/** What nodes say in words once they have run: which LoRA it is, where a file was written. */

import { app } from "../../scripts/app.js"
import { addElement, after, make, makeRoom } from "./dom.js"

const NODES = new Set(["FaceLoRAApply", "FaceLoRAInspect", "FaceLoRASave", "FaceLoRAStylePack"])
const LETTER = 6.7, LINE = 15, MOST_LINES = 44 // in pixels; it scrolls where there are more

class Said {
  constructor(node) {
    this.node = node
    this.text = make("pre", "facelora-said")
    addElement(node, "said", make("div", "facelora-panel", this.text), () => this.height())
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
  name: "facelora.said",
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return
    const said = new Said(node)
    panels.add(said)
    after(node, "onRemoved", () => panels.delete(said))
  },
  /** The outputs of a workflow that is shown again. */
  onNodeOutputsUpdated(outputs) {
    for (const said of panels) said.show(outputs[said.node.id]?.text)
  },
})
