// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who gets the next datagram of a socket that several processes have? The kernel wakes
 * the task whose receive call has waited longest.
 */
#include <linux/cred.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/wait.h>

#include "process.h"
#include "waiter.h"

/*
 * The task that waits by this entry of a socket's queue, or NULL. A receive call has its
 * entry on its stack. Those of epoll and io_uring are elsewhere, those of poll() are not
 * exclusive.
 */
static const struct task_struct *waiter_of(const struct wait_queue_entry *entry)
{
	if (!IS_ENABLED(CONFIG_VMAP_STACK) || !(entry->flags & WQ_FLAG_EXCLUSIVE) ||
	    !is_vmalloc_addr(entry))
		return NULL;
	return entry->private;
}

/**
 * sniffer_waiter_name - name a datagram after the process that will be given it
 * @r: it has the name of the socket's owner; that stays if nobody waits in a call
 * @sk: UDP socket that several processes have
 *
 * If several wait by other means, as epoll, the first of them to ask gets it.
 *
 * Under RCU.
 */
void sniffer_waiter_name(struct sniffer_record *r, struct sock *sk)
{
	struct socket_wq *wq = rcu_dereference(sk->sk_wq);
	const struct task_struct *task = NULL;
	struct wait_queue_entry *entry;
	unsigned int others = 0;
	unsigned long flags;

	if (!wq)
		return;
	spin_lock_irqsave(&wq->wait.lock, flags);
	list_for_each_entry(entry, &wq->wait.head, entry) {
		task = waiter_of(entry);
		if (task || ++others > 1)
			break;
	}
	if (task) {
		r->tgid = task->tgid;
		r->tid = task->pid;
		r->start_ns = task->group_leader->start_boottime;
		r->uid = __kuid_val(task_uid(task));
		sniffer_comm_copy(r->comm, task->group_leader->comm);
		r->flags &= ~SNIFFER_F_AMBIGUOUS;
	}
	if (others)
		r->flags |= task || others > 1 ? SNIFFER_F_AMBIGUOUS : 0;
	spin_unlock_irqrestore(&wq->wait.lock, flags);
}
