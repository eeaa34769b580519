//! Installs on a real host: the real agent, a real master and a real clamd, and what goes wrong in
//! the middle.

mod calls;
mod clamd;
mod directory;
mod forms;
mod host;
mod loads;
