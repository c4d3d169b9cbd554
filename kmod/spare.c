// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory for entries of the owner table. Removed entries wait together for the end of a
 * grace period. Some are then kept for the next sockets. This saves an RCU callback and
 * an allocation for each socket; many kernels also zero new memory. Both lists are
 * bounded for each CPU.
 *
 * Under KASAN nothing is kept, so that it reports a use after free.
 */
#include <linux/irqflags.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#include "spare.h"

#define SPARE_BATCH	32	/* entries that wait for one grace period */
#define SPARE_MAX	(IS_ENABLED(CONFIG_KASAN) ? 0 : 4 * SPARE_BATCH)

/* Used by its own CPU with interrupts off, or when nothing else runs. */
struct spare_cpu {
	struct sniffer_spare *free;	/* free: nobody reads them */
	unsigned int frees;
	struct sniffer_spare *gone;	/* may still have readers */
	unsigned int gones;
};

static DEFINE_PER_CPU(struct spare_cpu, spare_cpus);
static struct kmem_cache *spare_cache;
static size_t spare_offset;	/* of an entry's struct sniffer_spare; set at load only */

static void *spare_entry(struct sniffer_spare *spare)
{
	return (void *)spare - spare_offset;
}

/**
 * sniffer_spare_take - get memory for an entry
 *
 * Any context. Return: one with whatever is in it, or NULL when memory is short.
 */
void *sniffer_spare_take(void)
{
	struct sniffer_spare *spare;
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	spare = cpu->free;
	if (spare) {
		cpu->free = spare->next;
		cpu->frees--;
	}
	local_irq_restore(flags);
	return spare ? spare_entry(spare) : kmem_cache_alloc(spare_cache, GFP_ATOMIC | __GFP_NOWARN);
}

/**
 * sniffer_spare_put - give an entry's memory back
 * @spare: of an entry that nobody has seen, or that left the table a grace period ago
 *
 * Any context.
 */
void sniffer_spare_put(struct sniffer_spare *spare)
{
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	if (cpu->frees < SPARE_MAX) {
		spare->next = cpu->free;
		cpu->free = spare;
		cpu->frees++;
		spare = NULL;
	}
	local_irq_restore(flags);
	if (spare)
		kmem_cache_free(spare_cache, spare_entry(spare));
}

static void spare_put_rcu(struct rcu_head *rcu)
{
	struct sniffer_spare *spare = container_of(rcu, struct sniffer_spare, rcu), *next;

	for (; spare; spare = next) {
		next = spare->next;
		sniffer_spare_put(spare);
	}
}

/**
 * sniffer_spare_put_later - give memory back after a grace period, together with other
 * entries
 * @spare: of an entry that has just left the table
 *
 * Any context.
 */
void sniffer_spare_put_later(struct sniffer_spare *spare)
{
	struct spare_cpu *cpu;
	unsigned long flags;

	local_irq_save(flags);
	cpu = this_cpu_ptr(&spare_cpus);
	spare->next = cpu->gone;
	cpu->gone = spare;
	if (++cpu->gones >= SPARE_BATCH || !SPARE_MAX) {
		cpu->gone = NULL;
		cpu->gones = 0;
		call_rcu(&spare->rcu, spare_put_rcu);
	}
	local_irq_restore(flags);
}

static void spare_free_all(struct sniffer_spare *spare)
{
	struct sniffer_spare *next;

	for (; spare; spare = next) {
		next = spare->next;
		kmem_cache_free(spare_cache, spare_entry(spare));
	}
}

/* What has a constructor is not zeroed by the kernel: table.c sets each field itself. */
static void spare_made(void *entry)
{
}

/**
 * sniffer_spare_init - allow sniffer_spare_take() from now on
 * @size: of an entry
 * @offset: of its struct sniffer_spare
 *
 * Return: false when there is none.
 */
bool sniffer_spare_init(size_t size, size_t offset)
{
	spare_offset = offset;
	spare_cache = kmem_cache_create("sniffer_owner", size, 0, SLAB_HWCACHE_ALIGN,
					spare_made);
	return spare_cache;
}

/* Nobody has an entry any more, and the table is empty. */
void sniffer_spare_exit(void)
{
	struct spare_cpu *cpu;
	int id;

	synchronize_rcu();
	rcu_barrier();
	for_each_possible_cpu(id) {
		cpu = per_cpu_ptr(&spare_cpus, id);
		spare_free_all(cpu->gone);
		spare_free_all(cpu->free);
		*cpu = (struct spare_cpu){};
	}
	kmem_cache_destroy(spare_cache);
}
