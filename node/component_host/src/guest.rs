//! What one instance of a component has: its WASI context, its limits, its view of HTTP and of configuration.

use crate::outgoing::{Client, Hooks};
use crate::policy::denied;
use crate::report::Outcome;
use crate::spec::{Sockets, Spec};
use std::path::Path;
use std::sync::Arc;
use wasmtime::component::ResourceTable;
use wasmtime::{Engine, Result, Store, StoreLimits, StoreLimitsBuilder, UpdateDeadline};
use wasmtime_wasi::sockets::SocketAddrUse;
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_config::{WasiConfig, WasiConfigVariables};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

/// The data of a store.
pub struct Guest {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    /// Outgoing requests go through it.
    pub hooks: Hooks,
    table: ResourceTable,
    limits: StoreLimits,
    variables: Arc<WasiConfigVariables>,
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

impl WasiHttpView for Guest {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            ctx: &mut self.http,
            table: &mut self.table,
            hooks: &mut self.hooks,
        }
    }
}

impl Guest {
    /// `wasi:config`: the environment of the container, and so its ConfigMaps and Secrets.
    pub fn config(&mut self) -> WasiConfig<'_> {
        WasiConfig::new(&self.variables)
    }
}

/// Makes stores for one component; shared by all its instances.
pub struct Maker {
    engine: Engine,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    mounts: Vec<(std::path::PathBuf, String, FsPerms)>,
    stdin: bool,
    memory_bytes: Option<usize>,
    sockets: Option<Arc<Sockets>>,
    variables: Arc<WasiConfigVariables>,
    client: Client,
    epochs: bool,
}

impl Maker {
    /// Looks at each mount, so that one that cannot be opened is named before anything runs.
    pub fn new(spec: &Spec, engine: &Engine, epochs: bool) -> Result<Self, Outcome> {
        let mounts: Vec<_> = spec
            .mounts
            .iter()
            .map(|mount| {
                let perms = if mount.read_only {
                    FsPerms::ReadOnly
                } else {
                    FsPerms::ReadWrite
                };
                (mount.host.clone(), mount.guest.clone(), perms)
            })
            .collect();
        for (host, guest, _) in &mounts {
            check_folder(host).map_err(|error| Outcome::start_error(format!("mount {guest}: {error}")))?;
        }
        Ok(Maker {
            engine: engine.clone(),
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            mounts,
            stdin: spec.stdin,
            memory_bytes: spec
                .memory_bytes
                .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
            sockets: spec.sockets.clone().map(Arc::new),
            variables: Arc::new(spec.env.iter().cloned().collect()),
            client: Client::new(spec.outgoing.as_ref()),
            epochs,
        })
    }

    /// A store for a new instance. Within a runtime of tokio.
    pub fn store(&self) -> Result<Store<Guest>> {
        let mut store = Store::new(&self.engine, self.guest()?);
        store.limiter(|guest| &mut guest.limits);
        if self.epochs {
            store.set_epoch_deadline(1);
            // Not wasmtime's own way to yield: that is ready again at once, and a runtime that is never idle looks at
            // its sockets only every 61st time.
            store.epoch_deadline_callback(|_| {
                let pause = Box::pin(tokio::task::yield_now());
                Ok(UpdateDeadline::YieldCustom(1, pause))
            });
        }
        Ok(store)
    }

    fn guest(&self) -> Result<Guest> {
        let mut limits = StoreLimitsBuilder::new();
        if let Some(bytes) = self.memory_bytes {
            limits = limits.memory_size(bytes);
        }
        Ok(Guest {
            wasi: self.wasi()?,
            http: WasiHttpCtx::new(),
            hooks: Hooks::new(self.client.clone()),
            table: ResourceTable::new(),
            limits: limits.build(),
            variables: self.variables.clone(),
        })
    }

    fn wasi(&self) -> Result<WasiCtx> {
        let mut wasi = WasiCtxBuilder::new();
        wasi.args(&self.argv).envs(&self.env).inherit_stdout().inherit_stderr();
        // The process is this container's alone: a file operation may hold it up, and a thread for each costs more.
        wasi.allow_blocking_current_thread(true);
        if self.stdin {
            wasi.inherit_stdin();
        }
        for (host, guest, perms) in &self.mounts {
            wasi.preopened_dir(host, guest, *perms)?;
        }
        if let Some(sockets) = &self.sockets {
            wasi.allow_tcp(true)
                .allow_udp(true)
                .allow_ip_name_lookup(sockets.connect);
            let sockets = sockets.clone();
            wasi.socket_addr_check(move |address, usage| {
                let answer = match usage {
                    SocketAddrUse::TcpConnect | SocketAddrUse::UdpSend => {
                        sockets.connect && !denied(&sockets.deny, address.ip())
                    }
                    // Every connect binds, to port 0 of the wildcard address.
                    SocketAddrUse::TcpBind | SocketAddrUse::UdpBind => sockets.listen || address.port() == 0,
                    SocketAddrUse::UdpReceive => true,
                    _ => sockets.listen,
                };
                Box::pin(async move { answer })
            });
        }
        Ok(wasi.build())
    }
}

fn check_folder(path: &Path) -> Result<(), String> {
    let found = std::fs::read_dir(path).map(drop);
    found.map_err(|error| {
        let text = error.to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        format!("{text}: {}", path.display())
    })
}
