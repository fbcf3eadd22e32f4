//! The only module with `unsafe`: what C, the kernel and precompiled code need.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::os::fd::{FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use wasmtime::component::Component;
use wasmtime::{Engine, Result};

/// The version of the C functions and of the JSON text.
#[unsafe(no_mangle)]
pub extern "C" fn wasilet_component_host_abi() -> u32 {
    crate::ABI_VERSION
}

/// The version of wasmtime, NUL-terminated: Python compares it with its wheel's.
#[unsafe(no_mangle)]
pub extern "C" fn wasilet_component_host_wasmtime() -> *const c_char {
    concat!("50.0.1", "\0").as_ptr().cast()
}

/// Run what the JSON text describes, to its end; the exit code for the process. It must be a process of one thread.
///
/// # Safety
/// `text` points at `length` bytes that can be read; a null pointer counts as an empty text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wasilet_component_host_run(text: *const u8, length: usize) -> c_int {
    let text = if text.is_null() || length > isize::MAX as usize {
        &[]
    } else {
        // SAFETY: the caller's promise above.
        unsafe { std::slice::from_raw_parts(text, length) }
    };
    catch_unwind(AssertUnwindSafe(|| crate::run(text))).unwrap_or(crate::report::START_ERROR_EXIT_CODE)
}

/// Map a precompiled file.
pub fn load(engine: &Engine, artifact: &Path) -> Result<Component> {
    // SAFETY: the file was compiled on this machine, lies in a folder of mode 0700 and has had its digest checked.
    unsafe { Component::deserialize_file(engine, artifact) }
}

/// Take over a listening socket.
pub fn listener(descriptor: i32) -> std::io::Result<std::net::TcpListener> {
    if !is_open(descriptor) {
        return Err(std::io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, and Python gives it away.
    Ok(unsafe { std::net::TcpListener::from_raw_fd(descriptor) })
}

/// Write once to a descriptor that stays open.
pub fn write(descriptor: i32, data: &[u8]) -> std::io::Result<()> {
    // SAFETY: the kernel only reads from the slice.
    let written = unsafe { libc::write(descriptor, data.as_ptr().cast(), data.len()) };
    if written < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Map `count` counters that another process reads; for the rest of this process' life.
pub fn map_counters(descriptor: i32, count: usize) -> std::io::Result<&'static [AtomicU64]> {
    let bytes = count * size_of::<AtomicU64>();
    // SAFETY: fstat writes into the struct that it is given.
    let size = unsafe {
        let mut found: libc::stat = std::mem::zeroed();
        if libc::fstat(descriptor, &mut found) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        found.st_size
    };
    // Beyond a file's end a mapping is a SIGBUS.
    if size < bytes as i64 {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new shared mapping, never unmapped; the page is aligned for u64, and all access is atomic.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, descriptor, 0);
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(std::slice::from_raw_parts(address.cast::<AtomicU64>(), count))
    }
}

/// From now on SIGTERM does not end the process but makes the pipe readable.
///
/// Not tokio's signals: those need a socket pair, which the sandbox's system call filter refuses.
pub fn terminations() -> std::io::Result<OwnedFd> {
    let mut ends = [-1; 2];
    // SAFETY: pipe2 fills the two descriptors, which no one else owns.
    let reader = unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(ends[0])
    };
    TERMINATED.store(ends[1], Ordering::SeqCst);
    // SAFETY: the handler only writes to a pipe, which is allowed in a signal handler; the struct is zeroed and filled.
    let outcome = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = terminated as extern "C" fn(c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGTERM, &action, std::ptr::null_mut())
    };
    if outcome != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(reader)
}

/// The pipe's write end; open until the process ends.
static TERMINATED: AtomicI32 = AtomicI32::new(-1);

extern "C" fn terminated(_: c_int) {
    let byte = [1u8];
    // SAFETY: write is async-signal-safe, and errno is put back.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(TERMINATED.load(Ordering::SeqCst), byte.as_ptr().cast(), 1);
        *errno = before;
    }
}

fn is_open(descriptor: i32) -> bool {
    // SAFETY: F_GETFD touches no memory.
    descriptor >= 0 && unsafe { libc::fcntl(descriptor, libc::F_GETFD) } >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_null_pointer_is_an_empty_text() {
        assert_eq!(unsafe { wasilet_component_host_run(std::ptr::null(), 7) }, 128);
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        assert!(listener(-1).is_err());
        assert!(listener(1_000_000).is_err());
        assert!(map_counters(-1, 8).is_err());
    }
}
