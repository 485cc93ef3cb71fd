# SPDX-License-Identifier: Apache-2.0
"""Draw captioned landscapes, the pictures on which the demo teachers are trained.

A caption such as "mountains at sunset with clouds and a balloon" says what is there and leaves where and how
to chance: horizon, ridges, colours, the object's place and size. So few-step solvers fail as on Stable Diffusion.

    python scripts/demo/landscapes.py --output_dir outputs/demo-data --num_samples 8000

Picture number i is a function of (seed, i) alone. Output: webdataset shards of `KEY.png`, `KEY.txt`, `KEY.json`.
"""

import argparse
import io
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image, ImageDraw

TIMES = ("dawn", "noon", "sunset", "night")
TERRAINS = ("mountains", "hills", "desert", "sea", "forest")
WEATHERS = ("a clear sky", "clouds", "rain", "snow")
OBJECTS = ("a balloon", "a house", "a lighthouse", "a tent", "a windmill", "birds")
ATTRIBUTES = (TIMES, TERRAINS, WEATHERS, OBJECTS)
SUPERSAMPLING = 3

# Sky at the top, sky at the horizon, light on the ground (factor), fog colour; RGB in 0..255.
PALETTES = {
    "dawn": ((150, 170, 215), (250, 215, 205), (0.95, 0.85, 0.85), (225, 205, 210)),
    "noon": ((70, 140, 225), (185, 220, 245), (1.05, 1.05, 1.0), (190, 215, 235)),
    "sunset": ((95, 55, 120), (250, 140, 50), (0.85, 0.55, 0.45), (215, 120, 80)),
    "night": ((8, 12, 40), (35, 45, 90), (0.38, 0.42, 0.58), (35, 45, 85)),
}
GROUND = {
    "mountains": ((120, 125, 140), (85, 95, 105), (70, 110, 70)),
    "hills": ((120, 175, 90), (95, 155, 70), (75, 130, 55)),
    "desert": ((235, 200, 130), (220, 175, 100), (200, 150, 80)),
    "sea": ((60, 120, 170), (45, 105, 155), (30, 85, 135)),
    "forest": ((70, 115, 80), (45, 95, 60), (30, 75, 45)),
}


def caption_of(labels):
    time, terrain, weather, thing = (names[i] for names, i in zip(ATTRIBUTES, labels, strict=True))
    return f"{terrain} at {time} with {weather} and {thing}"


def random_captions(count, seed=7):
    """Return captions of random attributes: those by which the demo compares samplers."""
    rng = np.random.default_rng(seed)
    return [caption_of(row) for row in np.stack([rng.integers(len(n), size=count) for n in ATTRIBUTES], 1)]


def labels_of(caption):
    return [next(i for i, name in enumerate(names) if f" {name} " in f" {caption} ") for names in ATTRIBUTES]


def ridge(rng, width, roughness):
    """Return a height profile [width] in -1..1 by midpoint displacement."""
    points, scale = rng.uniform(-1, 1, 3), 0.6
    while len(points) < width:
        middle = (points[:-1] + points[1:]) / 2 + rng.uniform(-scale, scale, len(points) - 1)
        points = np.insert(points, range(1, len(points)), middle)
        scale *= roughness
    profile = np.interp(np.linspace(0, len(points) - 1, width), np.arange(len(points)), points)
    return profile / max(1.0, np.abs(profile).max())


class Scene:
    """One landscape being drawn on a canvas of side `size` times SUPERSAMPLING."""

    def __init__(self, labels, rng, size):
        named = (names[i] for names, i in zip(ATTRIBUTES, labels, strict=True))
        self.time, self.terrain, self.weather, self.thing = named
        self.rng, self.side = rng, size * SUPERSAMPLING
        self.sky_top, self.sky_low, self.light, self.fog = (np.array(c, float) for c in PALETTES[self.time])
        jitter = rng.normal(0, 7, 3)
        self.sky_top, self.sky_low = self.sky_top + jitter, self.sky_low + jitter
        if self.weather in ("rain", "snow", "clouds"):
            grey = 0.6 if self.weather == "rain" else 0.3
            self.sky_top = self.sky_top * (1 - grey) + self.sky_top.mean() * grey * 0.9
            self.sky_low = self.sky_low * (1 - grey / 2) + self.sky_low.mean() * grey / 2 * 0.95
        self.horizon = rng.uniform(0.45, 0.68)

    def shade(self, colour, lit=True):
        colour = np.array(colour, float) * (self.light if lit else 1.0)
        return tuple(int(c) for c in np.clip(colour, 0, 255))

    def point(self, x, y):
        return x * self.side, y * self.side

    def polygon(self, colour, *corners):
        self.canvas.polygon([self.point(*corner) for corner in corners], colour)

    def box(self, x, y, rx, ry):
        return [*self.point(x - rx, y - ry), *self.point(x + rx, y + ry)]

    def draw(self):
        ramp = np.linspace(0, 1, self.side)[:, None, None] / self.horizon
        sky = self.sky_top + (self.sky_low - self.sky_top) * np.clip(ramp, 0, 1) ** 1.3
        self.image = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8).repeat(self.side, 1))
        self.canvas = ImageDraw.Draw(self.image, "RGBA")
        self.draw_lights()
        if self.weather != "a clear sky":
            self.draw_clouds()
        getattr(self, f"draw_{self.terrain}")()
        getattr(self, "draw_" + self.thing.split()[-1])()
        self.draw_precipitation()
        return self.image.resize((self.side // SUPERSAMPLING,) * 2, Image.Resampling.BOX)

    def draw_lights(self):
        rng, x = self.rng, self.rng.uniform(0.12, 0.88)
        if self.time == "night":
            for _ in range(14 if self.weather == "a clear sky" else 4):
                self.canvas.ellipse(self.box(rng.uniform(), rng.uniform(0, 0.5), 0.011, 0.011), (235, 235, 255))
            self.canvas.ellipse(self.box(x, rng.uniform(0.1, 0.25), 0.07, 0.07), (240, 238, 215))
            return
        y = {"dawn": self.horizon - 0.1, "noon": rng.uniform(0.08, 0.2), "sunset": self.horizon - 0.04}[self.time]
        colour = {"dawn": (255, 240, 215), "noon": (255, 250, 205), "sunset": (255, 215, 90)}[self.time]
        radius = 0.1 if self.time == "sunset" else 0.075
        for factor, alpha in ((1.9, 50), (1.4, 80), (1.0, 255)):
            self.canvas.ellipse(self.box(x, y, radius * factor, radius * factor), (*colour, alpha))

    def draw_clouds(self):
        rng = self.rng
        tone = self.sky_low * 0.45 + (np.array((250, 250, 250.0)) if self.time != "night" else 90.0) * 0.55
        number, alpha = rng.integers(2, 5), 225
        if self.weather == "rain":
            tone, number = tone * 0.55, 6
        elif self.weather == "snow":
            tone, number = tone * 0.85, 3
        for _ in range(number):
            x, y, w = rng.uniform(0, 1), rng.uniform(0.06, self.horizon * 0.55), rng.uniform(0.1, 0.2)
            for _ in range(6):
                dx, r = rng.uniform(-1, 1), rng.uniform(0.25, 0.45)
                colour = (*self.shade(tone * rng.uniform(0.96, 1.03), lit=False), alpha)
                self.canvas.ellipse(self.box(x + dx * w, y + rng.uniform(-0.02, 0.02), w * r * 1.6, w * r), colour)

    def layer(self, base, amplitude, roughness, colour):
        """Fill everything below a ridge and return the ridge's relative heights [side]."""
        heights = base - amplitude * ridge(self.rng, self.side, roughness)
        outline = list(zip(range(self.side), heights * self.side, strict=True))
        self.canvas.polygon([(0, self.side), *outline, (self.side, self.side)], colour)
        return heights

    def colours(self):
        """Return the three ground colours, far to near, jittered, lit and faded into the fog."""
        jitter, result = self.rng.normal(0, 8, 3), []
        for depth, colour in enumerate(GROUND[self.terrain]):
            fade, lit = (0.35, 0.15, 0.0)[depth], (np.array(colour) + jitter) * self.light
            if self.weather == "snow" and self.terrain != "sea":
                lit = lit * 0.45 + np.array((235, 238, 245)) * np.maximum(self.light, 0.4) * 0.55
            result.append(self.shade(lit * (1 - fade) + self.fog * fade, lit=False))
        return result

    def draw_mountains(self):
        far, middle, near = self.colours()
        for base, amplitude, colour in ((self.horizon - 0.08, 0.2, far), (self.horizon + 0.04, 0.13, middle)):
            heights = self.layer(base, amplitude, 0.55, colour)
            if colour is far:
                snow_line = base - amplitude * 0.3
                for x in np.flatnonzero(heights < snow_line):
                    depth = (snow_line - heights[x]) * 0.7
                    segment = [(int(x), heights[x] * self.side), (int(x), (heights[x] + depth) * self.side)]
                    self.canvas.line(segment, self.shade((245, 245, 250)))
        self.layer(self.horizon + 0.2, 0.03, 0.4, near)

    def draw_hills(self):
        for depth, colour in enumerate(self.colours()):
            self.layer(self.horizon + 0.12 * depth, 0.08, 0.28, colour)

    def draw_desert(self):
        for depth, colour in enumerate(self.colours()):
            heights = self.layer(self.horizon + 0.04 + 0.13 * depth, 0.06, 0.22, colour)
            crest, fall = int(heights.argmin()), range(max(2, int(self.side * 0.22)))
            lee = [(crest + i, (heights[min(crest + i, self.side - 1)]) * self.side) for i in fall]
            shadow = tuple(int(c * 0.78) for c in colour)
            self.canvas.polygon([*lee, (crest - self.side * 0.1, (heights[crest] + 0.13) * self.side)], shadow)

    def draw_sea(self):
        far, middle, near = self.colours()
        ramp = np.linspace(0, 1, self.side - int(self.horizon * self.side))[:, None]
        for row, colour in enumerate(np.array(far) + (np.array(near) - np.array(far)) * ramp):
            y = int(self.horizon * self.side) + row
            self.canvas.line([(0, y), (self.side, y)], tuple(int(c) for c in colour))
        crest = tuple(int(c) for c in np.clip(np.array(middle) * 1.25 + 14, 0, 255))
        for _ in range(16):
            depth = self.rng.uniform(0.03, 1)
            x, y, w = self.rng.uniform(), self.horizon + depth * (1 - self.horizon), 0.03 + 0.09 * depth
            self.canvas.line([self.point(x - w, y), self.point(x + w, y)], crest, width=SUPERSAMPLING)

    def draw_forest(self):
        for depth, colour in enumerate(self.colours()):
            heights = self.layer(self.horizon + 0.02 + 0.13 * depth, 0.04, 0.3, colour)
            for x in np.arange(self.rng.uniform(0, 0.08), 1, 0.085 + 0.02 * depth):
                x = x + self.rng.uniform(-0.02, 0.02)
                foot = heights[int(np.clip(x, 0, 0.999) * self.side)] + 0.03
                h, w = self.rng.uniform(0.12, 0.2) * (0.8 + 0.25 * depth), 0.035 + 0.012 * depth
                tint = tuple(int(c * self.rng.uniform(0.85, 1.1)) for c in colour)
                for level in (0.0, 0.3):
                    tip, low = (x, foot - h * (1 - level * 0.2)), foot - h * level
                    self.polygon(tint, tip, (x - w, low), (x + w, low))

    def stand(self):
        """Return x, foot and size of an object on the ground; on the sea it gets an islet."""
        x, size = self.rng.uniform(0.2, 0.8), self.rng.uniform(0.16, 0.24)
        foot = self.rng.uniform(max(self.horizon + 0.14, 0.68), 0.9)
        if self.terrain == "sea":
            self.canvas.ellipse(self.box(x, foot + 0.01, size * 0.95, 0.05), self.shade((170, 150, 105)))
        return x, foot, size

    def pick(self, *colours):
        return self.shade(colours[self.rng.integers(len(colours))])

    def draw_balloon(self):
        rng, basket = self.rng, self.shade((130, 85, 45))
        x, y, r = rng.uniform(0.18, 0.82), rng.uniform(0.18, 0.42), rng.uniform(0.1, 0.14)
        colour = self.pick((230, 60, 50), (245, 190, 40), (60, 110, 220), (170, 70, 180))
        for side in (-0.35, 0.35):
            rope = [self.point(x + side * r * 2, y + r * 0.6), self.point(x + side * r, y + r * 1.7)]
            self.canvas.line(rope, basket, 2)
        self.polygon(colour, (x - r * 0.92, y + r * 0.4), (x + r * 0.92, y + r * 0.4), (x, y + r * 1.6))
        self.canvas.ellipse(self.box(x, y, r, r), colour)
        self.canvas.ellipse(self.box(x, y, r * 0.4, r), self.shade((250, 245, 235)))
        self.canvas.rectangle(self.box(x, y + r * 1.8, r * 0.32, r * 0.25), basket)

    def draw_house(self):
        x, foot, size = self.stand()
        w, h = size * 0.62, size * 0.75
        wall = self.pick((240, 235, 220), (225, 190, 140), (200, 215, 225))
        roof = self.pick((185, 60, 45), (120, 70, 50), (80, 85, 105))
        self.canvas.rectangle([*self.point(x - w, foot - h), *self.point(x + w, foot)], wall)
        self.polygon(roof, (x - w * 1.25, foot - h), (x + w * 1.25, foot - h), (x, foot - h - size * 0.7))
        window = (255, 225, 120) if self.time in ("night", "sunset") else (60, 70, 90)
        self.canvas.rectangle(self.box(x - w * 0.45, foot - h * 0.5, w * 0.26, h * 0.22), window)
        self.canvas.rectangle([*self.point(x + w * 0.2, foot - h * 0.7), *self.point(x + w * 0.7, foot)], roof)

    def draw_lighthouse(self):
        x, foot, size = self.stand()
        h, w = size * 2.0, size * 0.36
        stripe = self.pick((205, 45, 45), (45, 75, 150))
        for i in range(5):
            low, high = i / 5, (i + 1) / 5
            wl, wh = w * (1 - 0.4 * low), w * (1 - 0.4 * high)
            bottom, top = foot - h * low, foot - h * high
            colour = stripe if i % 2 else self.shade((245, 245, 240))
            self.polygon(colour, (x - wl, bottom), (x + wl, bottom), (x + wh, top), (x - wh, top))
        self.canvas.rectangle(self.box(x, foot - h - 0.035, w * 0.45, 0.035), (255, 235, 130))
        self.polygon(stripe, *((x + side * w * 0.75, foot - h - 0.065) for side in (-1, 1)), (x, foot - h - 0.13))

    def draw_tent(self):
        x, foot, size = self.stand()
        colour = self.pick((235, 120, 40), (220, 60, 80), (90, 170, 70), (240, 205, 60))
        top = (x, foot - size * 1.05)
        self.polygon(colour, (x - size, foot), (x + size, foot), top)
        opening = (255, 225, 130) if self.time == "night" else tuple(c // 3 for c in colour)
        self.polygon(opening, (x - size * 0.4, foot), (x + size * 0.4, foot), top)

    def draw_windmill(self):
        x, foot, size = self.stand()
        h, w = size * 1.35, size * 0.42
        body = self.pick((235, 225, 205), (170, 110, 80), (150, 160, 175))
        self.polygon(body, (x - w, foot), (x + w, foot), (x + w * 0.6, foot - h), (x - w * 0.6, foot - h))
        self.canvas.pieslice(self.box(x, foot - h, w * 0.7, w * 0.7), 180, 360, self.shade((110, 60, 50)))
        angle = self.rng.uniform(0, math.pi / 2)
        sail = self.shade((250, 248, 240)) if self.time != "night" else (150, 155, 180)
        for k in range(4):
            dx, dy = math.cos(angle + k * math.pi / 2), math.sin(angle + k * math.pi / 2)
            tip = self.point(x + dx * size * 0.85, foot - h + dy * size * 0.85)
            self.canvas.line([self.point(x, foot - h), tip], sail, width=int(self.side * 0.035))

    def draw_birds(self):
        rng, colour = self.rng, (215, 220, 235) if self.time == "night" else (35, 30, 40)
        cx, cy = rng.uniform(0.25, 0.75), rng.uniform(0.16, 0.36)
        for _ in range(rng.integers(4, 7)):
            x, y, w = cx + rng.uniform(-0.22, 0.22), cy + rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.075)
            wings = [self.point(x - w, y - w * 0.55), self.point(x, y), self.point(x + w, y - w * 0.55)]
            self.canvas.line(wings, colour, width=int(self.side * 0.02), joint="curve")

    def draw_precipitation(self):
        rng = self.rng
        if self.weather == "rain":
            slant, colour = rng.uniform(-0.03, 0.03), (205, 215, 235, 150)
            for _ in range(46):
                x, y = rng.uniform(), rng.uniform(-0.05, 1)
                self.canvas.line([self.point(x, y), self.point(x + slant, y + 0.1)], colour, width=2)
        elif self.weather == "snow":
            for _ in range(34):
                r = rng.uniform(0.011, 0.018)
                self.canvas.ellipse(self.box(rng.uniform(), rng.uniform(), r, r), (250, 250, 255, 240))


def draw_sample(index, seed=0, size=64, varied=False):
    """Return picture `index` as (uint8 array [size, size, 3], four attribute indices).

    Varied ones are as files of a mixed collection: 55% like that, 15% of half the side, 15% a wide part of a
    larger picture, [size, 1.5 size, 3], and 15% a tall part.
    """
    rng = np.random.default_rng((seed, index))
    labels = [int(rng.integers(len(names))) for names in ATTRIBUTES]
    kind = rng.choice(("square", "small", "wide", "tall"), p=(0.55, 0.15, 0.15, 0.15)) if varied else "square"
    side = {"square": size, "small": size // 2}.get(kind, size * 3 // 2)
    picture = np.asarray(Scene(labels, rng, side).draw())
    part = slice((side - size) // 2, (side + size) // 2)
    return {"wide": picture[part], "tall": picture[:, part]}.get(kind, picture), labels


def draw_dataset(num_samples, seed=0, size=64, varied=False):
    """Return (list of pictures uint8 [H, W, 3], labels int64 [N, 4]), drawn on all cores."""
    draw = partial(draw_sample, seed=seed, size=size, varied=varied)
    with ProcessPoolExecutor() as pool:
        pictures, labels = zip(*pool.map(draw, range(num_samples), chunksize=250), strict=True)
    return list(pictures), np.array(labels)


def write_shards(args):
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pictures, labels = draw_dataset(args.num_samples, args.seed, varied=args.varied)
    with wds.ShardWriter(str(args.output_dir / "%05d.tar"), maxcount=1000, verbose=0) as writer:
        for i, picture in enumerate(pictures):
            png, caption, (height, width, _) = io.BytesIO(), caption_of(labels[i]), picture.shape
            Image.fromarray(picture).save(png, "PNG")
            record = {"caption": caption, "width": width, "height": height}
            record |= {"original_width": width, "original_height": height}
            texts = {"txt": caption.encode(), "json": json.dumps(record).encode()}
            writer.write({"__key__": f"{i:07d}", "png": png.getvalue()} | texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default="outputs/demo-data", help="folder for the shards")
    add("--captions", type=int, metavar="N", help="print N random captions, and draw nothing")
    add("--num_samples", type=int, default=8000, help="pictures to draw (default: %(default)s)")
    add("--seed", type=int, default=1, help="the teacher's own pictures have seed 0 (default: %(default)s)")
    add("--varied", action="store_true", help="of mixed sizes and shapes, for SDXL")
    args = parser.parse_args()
    if args.captions:
        print(*random_captions(args.captions), sep="\n")
        return
    write_shards(args)
    print(f"{args.num_samples} pictures in {args.output_dir}", file=sys.stderr)


if __name__ == "__main__":
    main()
