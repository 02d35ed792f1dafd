/** Line charts as SVG, in the colours of ComfyUI's theme. */

import { say } from "./words.js"

const WIDTH = 320, HEIGHT = 96, LEFT = 52, RIGHT = 52, TOP = 18, BOTTOM = 16
const MARGIN = 4 // between the frame and the lowest and highest value
const SVG = "http://www.w3.org/2000/svg"

/** Ticks of at most four characters or so: 0.0812, 1e-4, 120. */
export function short(value) {
  if (value === 0) return "0"
  const size = Math.abs(value)
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e")
  return size < 10 ? Number(value.toPrecision(3)).toString() : Math.round(value).toString()
}

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  if (text !== undefined) made.textContent = text
  return made
}

/** Lowest and highest value. */
function range(points) {
  const values = points.map(([, value]) => value)
  return [Math.min(...values), Math.max(...values)]
}

/**
 * Draws one or two lines over the steps into an <svg>. Each line is {name, points: [[step, value], ...], colour}; the
 * first has its scale on the left, the second on the right.
 */
export function drawChart(svg, lines, lastStep) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`)
  const shown = lines.filter((line) => line.points.length)
  const parts = [
    element("rect", {
      x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM, class: "facelora-frame",
    }),
  ]
  shown.forEach((line, index) => {
    const [low, high] = range(line.points)
    const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / Math.max(lastStep, 1)
    const y = (value) => HEIGHT - BOTTOM - MARGIN - ((HEIGHT - TOP - BOTTOM - 2 * MARGIN) * (value - low)) / (high - low || 1)
    const path = line.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`)
    const right = index > 0
    const side = right ? { x: WIDTH - RIGHT + 4 } : { x: LEFT - 4, "text-anchor": "end" }
    const title = right ? { x: WIDTH - RIGHT, "text-anchor": "end" } : { x: LEFT }
    parts.push(element("polyline", { points: path.join(" "), stroke: line.colour, "data-line": line.name }))
    if (path.length === 1) {
      const [step, value] = line.points[0]
      parts.push(element("circle", { cx: x(step), cy: y(value), r: 2, fill: line.colour }))
    }
    parts.push(element("text", { ...title, y: TOP - 5, style: `fill: ${line.colour}` }, say(line.name)))
    for (const value of new Set([high, low])) parts.push(element("text", { ...side, y: y(value) + 4 }, short(value)))
  })
  parts.push(element("text", { x: LEFT, y: HEIGHT - 3 }, "0"))
  parts.push(element("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, say("step {}", lastStep)))
  svg.replaceChildren(...parts)
}
