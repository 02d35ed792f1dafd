/** The text that a node shows once it has run, such as the name of a LoRA or a saved file. */

import { app } from "../../scripts/app.js"
import { addElement, after, makeRoom, outputOf, readReport, showText, widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { say } from "./words.js"

const NODES = new Set(["FaceLoRAApply", "FaceLoRAGroup", "FaceLoRAInspect", "FaceLoRASave", "FaceLoRAStylePack"])
const APPLY = "FaceLoRAApply", CONNECTED = "(the connected LoRA)"
const LETTER = 6.7, LINE = 15, BUTTON = 30, MOST_LINES = 44 // in pixels; longer texts scroll

class ResultText {
  constructor(node) {
    this.node = node
    this.text = make("pre", "facelora-result-text")
    const root = make("div", "facelora-panel", this.text)
    if (node.comfyClass === APPLY) root.prepend(this.button())
    addElement(node, "result_text", root, () => this.height())
    after(node, "onExecuted", ({ text }) => this.show(text))
  }

  /** Shows the report on the chosen file, or for a connected LoRA, the text of the last run. */
  button() {
    this.about = make("button", "facelora-about", say("About this LoRA"))
    this.about.title = say("Show its model family, trigger words and training settings")
    this.about.addEventListener("click", async () => {
      const { value } = widgetOf(this.node, "lora_name")
      const connected = value === CONNECTED || this.node.inputs.find((input) => input.name === "lora")?.link != null
      const report = connected ? this.text.textContent : await readReport(`/facelora/lora?name=${encodeURIComponent(value)}`)
      showText(report || say("Run the node first to see the connected LoRA"))
    })
    return make("div", "facelora-row", this.about)
  }

  show(text = []) {
    this.text.textContent = text.join("\n")
    makeRoom(this.node)
  }

  height() {
    const text = this.text.textContent, button = this.about ? BUTTON : 0
    if (!text) return button
    const columns = Math.max(10, Math.floor((this.node.size[0] - 40) / LETTER))
    const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0)
    return button + LINE * Math.min(lines, MOST_LINES) + 16
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
    for (const shown of panels) shown.show(outputOf(shown.node, outputs)?.text)
  },
})
