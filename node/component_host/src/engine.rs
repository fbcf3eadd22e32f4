//! The engine: its settings must be those that the compile worker used (`node/.../engine.py`), else nothing loads.

use crate::spec::{Role, Spec};
use wasmtime::{Collector, Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Result};

/// What a guest's native frames may use of a stack.
const WASM_STACK_BYTES: usize = 1024 * 1024;
/// Of one instance in a pool. A component of several core modules has one of each per module.
const MEMORIES_PER_INSTANCE: u32 = 4;
const TABLES_PER_INSTANCE: u32 = 8;
const CORE_INSTANCES_PER_INSTANCE: u32 = 32;
/// Function tables of interpreters compiled to WebAssembly have 10,000 entries and more.
const MAX_TABLE_ELEMENTS: usize = 100_000;

/// The engine for a spec. `pool`: instances are made in memory that is set aside and used again, which makes one in a
/// few microseconds. Not every component fits into a pool.
pub fn make(spec: &Spec, pool: bool) -> Result<Engine> {
    let mut config = base();
    if let Role::Server(server) = &spec.role {
        config.epoch_interruption(true);
        if pool {
            config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool_for(server.max_concurrent)));
        }
    }
    Engine::new(&config)
}

fn base() -> Config {
    let mut config = Config::new();
    config.wasm_component_model(true);
    config.max_wasm_stack(WASM_STACK_BYTES);
    // What a build with a compiler chooses by itself; without one the engine refuses to load such code.
    config.collector(Collector::DeferredReferenceCounting);
    config
}

fn pool_for(concurrent: u32) -> PoolingAllocationConfig {
    // An instance that ends and the one that takes its place can be there together.
    let instances = concurrent.saturating_add(4);
    let mut pool = PoolingAllocationConfig::default();
    pool.total_component_instances(instances);
    pool.total_core_instances(instances.saturating_mul(CORE_INSTANCES_PER_INSTANCE));
    pool.total_memories(instances.saturating_mul(MEMORIES_PER_INSTANCE).min(MOST_MEMORIES));
    pool.total_tables(instances.saturating_mul(TABLES_PER_INSTANCE));
    pool.total_stacks(instances);
    pool.table_elements(MAX_TABLE_ELEMENTS);
    pool.max_tables_per_module(TABLES_PER_INSTANCE);
    pool.max_memories_per_module(MEMORIES_PER_INSTANCE);
    pool
}

/// Each has 4 GiB of address space set aside, of 128 TiB.
const MOST_MEMORIES: u32 = 1024;
