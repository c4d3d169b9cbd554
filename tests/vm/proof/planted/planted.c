// SPDX-License-Identifier: GPL-2.0-only
/*
 * One bug for each detector of a debug kernel, so that its silence means something.
 *
 * insmod planted.ko bug=NAME plays it and stays loaded. Never for a kernel that is needed.
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rculist.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static char *bug = "";
module_param(bug, charp, 0444);
MODULE_PARM_DESC(bug, "which one");

static void use_after_free(void)
{
	char *memory = kmalloc(40, GFP_KERNEL);

	if (!memory)
		return;
	kfree(memory);
	OPTIMIZER_HIDE_VAR(memory);
	WRITE_ONCE(memory[8], 1);
}

static void out_of_bounds(void)
{
	char *memory = kmalloc(40, GFP_KERNEL);

	if (!memory)
		return;
	OPTIMIZER_HIDE_VAR(memory);
	WRITE_ONCE(memory[40], 1);
	kfree(memory);
}

static DEFINE_MUTEX(first);
static DEFINE_MUTEX(second);

static void lock_inversion(void)
{
	mutex_lock(&first);
	mutex_lock(&second);
	mutex_unlock(&second);
	mutex_unlock(&first);
	mutex_lock(&second);
	mutex_lock(&first);
	mutex_unlock(&first);
	mutex_unlock(&second);
}

static DEFINE_SPINLOCK(lock);

static void atomic_sleep(void)
{
	spin_lock(&lock);
	might_sleep();
	spin_unlock(&lock);
}

static void leak(void)
{
	char *memory = kmalloc(4000, GFP_KERNEL);

	OPTIMIZER_HIDE_VAR(memory);
}

struct node {
	struct hlist_node node;
};

static HLIST_HEAD(nodes);
static void __rcu *shared;

static void rcu_dereference_without(void)
{
	WARN_ON_ONCE(rcu_dereference(shared));
}

static void rcu_walk_without(void)
{
	struct node *one;

	hlist_for_each_entry_rcu(one, &nodes, node)
		WARN_ON_ONCE(one);
}

static struct rcu_head twice;

static void nothing(struct rcu_head *head)
{
}

static void rcu_twice(void)
{
	call_rcu(&twice, nothing);
	call_rcu(&twice, nothing);
	rcu_barrier();
}

static unsigned long counted;
static unsigned long race_ends;

static int count_up(void *unused)
{
	while (time_before(jiffies, race_ends)) {
		counted++;
		barrier();
		cond_resched();
	}
	return 0;
}

static void race(void)
{
	unsigned int cpu;

	race_ends = jiffies + 2 * HZ;
	for_each_online_cpu(cpu) {
		struct task_struct *thread = kthread_create(count_up, NULL, "count/%u", cpu);

		if (IS_ERR(thread))
			return;
		kthread_bind(thread, cpu);
		wake_up_process(thread);
	}
	ssleep(3);	/* they have ended before this module can go */
}

static const struct {
	const char *name;
	void (*play)(void);
} bugs[] = {
	{ "use_after_free", use_after_free },
	{ "out_of_bounds", out_of_bounds },
	{ "lock_inversion", lock_inversion },
	{ "atomic_sleep", atomic_sleep },
	{ "leak", leak },
	{ "rcu_dereference", rcu_dereference_without },
	{ "rcu_walk", rcu_walk_without },
	{ "rcu_twice", rcu_twice },
	{ "data_race", race },
};

static int __init planted_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(bugs); i++)
		if (!strcmp(bug, bugs[i].name)) {
			bugs[i].play();
			return 0;
		}
	return -EINVAL;
}

static void __exit planted_exit(void)
{
}

module_init(planted_init);
module_exit(planted_exit);
MODULE_DESCRIPTION("bugs that a debug kernel has to find");
MODULE_LICENSE("GPL");
