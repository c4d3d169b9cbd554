// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory for entries of the owner table. Those that have left it wait together for
 * the end of a grace period, and some are kept for the next sockets: that spares
 * an RCU callback a socket, and an allocation, which many kernels fill with zeros
 * first. What waits and what is kept is bounded for each CPU.
 *
 * Under KASAN nothing is kept, so that it sees what is used too late.
 */
#include <linux/irqflags.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#include "spare.h"
#include "table.h"

#define SPARE_BATCH	32	/* entries that wait for one grace period */
#define SPARE_MAX	(IS_ENABLED(CONFIG_KASAN) ? 0 : 4 * SPARE_BATCH)

/* Used by its own CPU with interrupts off, or when nobody else is left. */
struct spare_cpu {
	struct sniffer_owner *free;	/* nobody reads them */
	unsigned int frees;
	struct sniffer_owner *gone;	/* who found them in the table may read them still */
	unsigned int gones;
};

static DEFINE_PER_CPU(struct spare_cpu, spare_cpus);
static struct kmem_cache *spare_cache;

/**
 * sniffer_spare_take - memory for an entry
 *
 * Any context. Return: a zeroed one, or NULL when memory is short.
 */
struct sniffer_owner *sniffer_spare_take(void)
{
	struct sniffer_owner *owner;
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	owner = cpu->free;
	if (owner) {
		cpu->free = owner->next_spare;
		cpu->frees--;
	}
	local_irq_restore(flags);
	if (!owner)
		return kmem_cache_zalloc(spare_cache, GFP_ATOMIC | __GFP_NOWARN);
	*owner = (struct sniffer_owner){};
	return owner;
}

/**
 * sniffer_spare_put - give an entry's memory back
 * @owner: that nobody else has seen, or a grace period has passed since
 *
 * Any context.
 */
void sniffer_spare_put(struct sniffer_owner *owner)
{
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	if (cpu->frees < SPARE_MAX) {
		owner->next_spare = cpu->free;
		cpu->free = owner;
		cpu->frees++;
		owner = NULL;
	}
	local_irq_restore(flags);
	if (owner)
		kmem_cache_free(spare_cache, owner);
}

static void spare_put_all(struct sniffer_owner *owner)
{
	struct sniffer_owner *next;

	for (; owner; owner = next) {
		next = owner->next_spare;
		sniffer_spare_put(owner);
	}
}

static void spare_put_rcu(struct rcu_head *rcu)
{
	spare_put_all(container_of(rcu, struct sniffer_owner, rcu));
}

/**
 * sniffer_spare_put_later - the same after a grace period, and after some more entries
 * @owner: has just left the table
 *
 * Any context.
 */
void sniffer_spare_put_later(struct sniffer_owner *owner)
{
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	owner->next_spare = cpu->gone;
	cpu->gone = owner;
	if (++cpu->gones >= SPARE_BATCH || !SPARE_MAX) {
		cpu->gone = NULL;
		cpu->gones = 0;
		call_rcu(&owner->rcu, spare_put_rcu);
	}
	local_irq_restore(flags);
}

/**
 * sniffer_spare_init - from now on there is memory
 *
 * Return: false when there is none.
 */
bool sniffer_spare_init(void)
{
	spare_cache = kmem_cache_create("sniffer_owner", sizeof(struct sniffer_owner), 0,
					SLAB_HWCACHE_ALIGN, NULL);
	return spare_cache;
}

/* Nobody has an entry any more, and none is in the table. */
void sniffer_spare_exit(void)
{
	struct sniffer_owner *owner;
	struct spare_cpu *cpu;
	int id;

	synchronize_rcu();
	rcu_barrier();
	for_each_possible_cpu(id) {
		cpu = per_cpu_ptr(&spare_cpus, id);
		while ((owner = cpu->gone)) {
			cpu->gone = owner->next_spare;
			kmem_cache_free(spare_cache, owner);
		}
		while ((owner = cpu->free)) {
			cpu->free = owner->next_spare;
			kmem_cache_free(spare_cache, owner);
		}
	}
	kmem_cache_destroy(spare_cache);
}
