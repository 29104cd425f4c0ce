// What plays: a video, or the mere clock while there is none; and a second video to compare with.

const player = {
  video: null, before: null, shown: null, // <video> elements; the result that is shown
  playing: false, frames: 17, fps: 8, clock: 0, last: 0,

  // The number of the frame, from 0.
  get frame() {
    const seconds = this.video ? this.video.currentTime : this.clock;
    return clamp(Math.floor(seconds * this.fps + 1e-3), 0, this.frames - 1);
  },

  // Share of the video's time, of the frame that is shown.
  get time() { return this.frames > 1 ? this.frame / (this.frames - 1) : 0; },

  // Shows a video of so many frames, or none.
  show(source, frames, fps, before = "") {
    for (const old of [this.video, this.before]) if (old) { old.pause(); old.removeAttribute("src"); old.load(); }
    [this.video, this.before] = [source, before].map((each) => each ? this.open(each) : null);
    [this.frames, this.fps, this.clock] = [frames, fps, 0];
    if (this.playing) this.play();
    paint();
  },

  open(source) {
    const video = document.createElement("video");
    Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "auto", src: source });
    for (const event of ["loadeddata", "seeked"]) video.addEventListener(event, () => paint());
    return video;
  },

  play() {
    [this.playing, this.last] = [true, performance.now()];
    for (const each of [this.video, this.before]) if (each) each.play().catch(() => {}); // refused or replaced: it stays still
    paint();
  },

  pause() {
    this.playing = false;
    for (const each of [this.video, this.before]) if (each) each.pause();
    paint();
  },

  seek(frame) {
    this.pause();
    this.clock = ((frame + this.frames) % this.frames + 0.01) / this.fps;
    if (this.video) this.video.currentTime = this.clock;
    paint();
  },

  // Once for each picture on the screen.
  tick(now) {
    if (this.playing && !this.video) this.clock = (this.clock + (now - this.last) / 1000) % (this.frames / this.fps);
    this.last = now;
    const { video, before } = this;
    if (!before || !before.duration || !video.duration || before.seeking) return;
    const wanted = (video.currentTime / video.duration) * before.duration;
    if (Math.abs(before.currentTime - wanted) > (this.playing ? 1.5 : 0.1) / this.fps) before.currentTime = wanted;
  },
};

const ready = (video) => video && video.readyState >= 2;
