"""Small components in WebAssembly text, without adapter, for the tests of the runtime."""

from __future__ import annotations

_EXIT_INTERFACE = """
  (type (;0;) (result))
  (type (;1;) (func (param "status" 0)))
  (export "exit" (func (type 1)))
  (type (;2;) (func (param "status-code" u8)))
  (export "exit-with-code" (func (type 2)))
"""


def component_guest(body: str, *, export: str = "wasi:cli/run@0.2.3", imports: str = "", start: str = "") -> str:
    """``body`` is the core ``run``, which may call ``$exit`` and ``$exit_code``, as ``start`` may: what its module does
    while it is instantiated. ``imports`` are further ones, unused."""
    first = f"(func $first {start}) (start $first)" if start else ""
    return f"""
(component
  {imports}
  (import "wasi:cli/exit@0.2.3" (instance $exit {_EXIT_INTERFACE}))
  (core func $exit (canon lower (func $exit "exit")))
  (core func $exit_code (canon lower (func $exit "exit-with-code")))
  (core module $main
    (import "host" "exit" (func $exit (param i32)))
    (import "host" "exit_code" (func $exit_code (param i32)))
    {first}
    (func (export "run") (result i32) {body}))
  (core instance $m (instantiate $main
    (with "host" (instance (export "exit" (func $exit)) (export "exit_code" (func $exit_code))))))
  (func $run (result (result)) (canon lift (core func $m "run")))
  (instance $run_interface (export "run" (func $run)))
  (export "{export}" (instance $run_interface)))
"""


_SOCKET_ERRORS = (
    *("unknown", "access-denied", "not-supported", "invalid-argument", "out-of-memory", "timeout"),
    *("concurrency-conflict", "not-in-progress", "would-block", "invalid-state", "new-socket-limit"),
    *("address-not-bindable", "address-in-use", "remote-unreachable", "connection-refused", "connection-reset"),
    *("connection-aborted", "datagram-too-large", "name-unresolvable", "temporary-resolver-failure"),
    "permanent-resolver-failure",
)
ACCESS_DENIED = _SOCKET_ERRORS.index("access-denied")


UNKNOWN_ERROR = _SOCKET_ERRORS.index("unknown")
"""What a process gets that has all the descriptors it may have."""


def socket_guest(protocol: str, *, sockets: int = 1) -> str:
    """Asks for so many ``tcp`` or ``udp`` sockets and keeps them; exits with 0 when it gets all, else with 100 and the
    error's number."""
    errors = " ".join(f'"{name}"' for name in _SOCKET_ERRORS)
    return f"""
(component
  (import "wasi:sockets/network@0.2.3" (instance $network
    (type $errors (enum {errors})) (export "error-code" (type (eq $errors)))
    (type $families (enum "ipv4" "ipv6")) (export "ip-address-family" (type (eq $families)))))
  (alias export $network "error-code" (type $error))
  (alias export $network "ip-address-family" (type $family))
  (import "wasi:sockets/{protocol}@0.2.3" (instance $sockets (export "{protocol}-socket" (type (sub resource)))))
  (alias export $sockets "{protocol}-socket" (type $socket))
  (import "wasi:sockets/{protocol}-create-socket@0.2.3" (instance $create
    (alias outer 1 $error (type $e)) (export "error-code" (type $error (eq $e)))
    (alias outer 1 $family (type $f)) (export "ip-address-family" (type $family (eq $f)))
    (alias outer 1 $socket (type $s)) (export "{protocol}-socket" (type $socket (eq $s)))
    (export "create-{protocol}-socket"
      (func (param "address-family" $family) (result (result (own $socket) (error $error)))))))
  (import "wasi:cli/exit@0.2.3" (instance $exit {_EXIT_INTERFACE}))
  (core module $memory (memory (export "memory") 1))
  (core instance $memory (instantiate $memory))
  (core func $create (canon lower (func $create "create-{protocol}-socket")
    (memory (core memory $memory "memory"))))
  (core func $exit_code (canon lower (func $exit "exit-with-code")))
  (core module $main
    (import "host" "memory" (memory 1))
    (import "host" "create" (func $create (param i32 i32)))
    (import "host" "exit_code" (func $exit_code (param i32)))
    (func (export "run") (result i32) (local $made i32)
      (loop $again
        (call $create (i32.const 0) (i32.const 0))
        (if (i32.load8_u (i32.const 0))
          (then (call $exit_code (i32.add (i32.const 100) (i32.load8_u (i32.const 4))))))
        (local.set $made (i32.add (local.get $made) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $made) (i32.const {sockets}))))
      (i32.const 0)))
  (core instance $m (instantiate $main (with "host" (instance
    (export "memory" (memory $memory "memory"))
    (export "create" (func $create))
    (export "exit_code" (func $exit_code))))))
  (func $run (result (result)) (canon lift (core func $m "run")))
  (instance $run_interface (export "run" (func $run)))
  (export "wasi:cli/run@0.2.3" (instance $run_interface)))
"""


def config_guest(key: str) -> str:
    """Asks ``wasi:config`` for ``key``; exits with the number of the value's first character, 100 where there is no
    such key, 200 for an error."""
    return f"""
(component
  (import "wasi:config/store@0.2.0-rc.1" (instance $store
    (type $errors (variant (case "upstream" string) (case "io" string))) (export "error" (type $error (eq $errors)))
    (export "get" (func (param "key" string) (result (result (option string) (error $error)))))))
  (import "wasi:cli/exit@0.2.3" (instance $exit {_EXIT_INTERFACE}))
  (core module $memory
    (memory (export "memory") 1)
    (data (i32.const 64) "{key}")
    (global $at (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.get $at)
      (global.set $at (i32.add (global.get $at) (local.get 3)))))
  (core instance $memory (instantiate $memory))
  (core func $get (canon lower (func $store "get")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $exit_code (canon lower (func $exit "exit-with-code")))
  (core module $main
    (import "host" "memory" (memory 1))
    (import "host" "get" (func $get (param i32 i32 i32)))
    (import "host" "exit_code" (func $exit_code (param i32)))
    (func (export "run") (result i32)
      (call $get (i32.const 64) (i32.const {len(key)}) (i32.const 0))
      (if (i32.load8_u (i32.const 0)) (then (call $exit_code (i32.const 200))))
      (if (i32.eqz (i32.load8_u (i32.const 4))) (then (call $exit_code (i32.const 100))))
      (call $exit_code (i32.load8_u (i32.load (i32.const 8))))
      (i32.const 0)))
  (core instance $m (instantiate $main (with "host" (instance
    (export "memory" (memory $memory "memory"))
    (export "get" (func $get))
    (export "exit_code" (func $exit_code))))))
  (func $run (result (result)) (canon lift (core func $m "run")))
  (instance $run_interface (export "run" (func $run)))
  (export "wasi:cli/run@0.2.3" (instance $run_interface)))
"""
